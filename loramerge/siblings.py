"""What a module does in its model, and which others read the same input, told by their names."""

import re
from collections.abc import Callable

from loramerge.adapter import Role

__all__ = ["readers", "role"]

# Projections of one input, as model code names them: queries, keys and values of an attention.
ATTENTION = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
)
GATES = (("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1"))
# In these blocks queries come from one sequence, keys and values from another.
CROSS = ("cross", "attn2", "encoder_attn", "encdecattention", "encoder_decoder")
# Values, and projections that hold queries, keys and values in one.
VALUES = re.compile(
    r"(?:.*[._])?(?:v_proj|value|to_v|wv|v|v_lin|qkv|qkv_proj|to_qkv|wqkv|c_attn|query_key_value)",
    re.IGNORECASE,
)
# Queries and keys, and what puts the heads of an attention together again.
MATCHED = re.compile(
    r"(?:.*[._])?(?:[qk]_proj|query|key|to_[qk]|w[qk]|[qk]|[qk]_lin)", re.IGNORECASE
)
JOINED = re.compile(
    r".*att[a-z]*\d*[._](?:output[._])?"
    r"(?:o|o_proj|out_proj|to_out(?:[._]0)?|to_add_out|wo|out_lin|c_proj|proj|dense)",
    re.IGNORECASE,
)
# What leads from the wide inside of an MLP back.
DOWN = re.compile(
    r"(?:.*[._])?(?:down_proj|w2|fc2|lin2|dense_4h_to_h|net[._]2|output[._]dense"
    r"|(?:mlp|ff|ffn|feed_forward|DenseReluDense)[._](?:c_proj|wo))",
    re.IGNORECASE,
)


def role(name: str) -> Role:
    """What a module does; queries, keys and values in one count as values."""
    if MATCHED.fullmatch(name):
        return "query"
    if JOINED.fullmatch(name):
        return "output"
    if VALUES.fullmatch(name):
        return "value"
    return "down" if DOWN.fullmatch(name) else "other"


def readers(name: str, there: Callable[[str], bool]) -> tuple[str, ...]:
    """The modules that are there and read what `name` reads, itself too, in a fixed order.

    They stand under one parent. A name that is in no group is alone.
    """
    parent, _, own = name.rpartition(".")
    crossed = any(word in parent.lower() for word in CROSS)
    groups = (*GATES, *(group[1:] if crossed else group for group in ATTENTION))
    dot = f"{parent}." if parent else ""
    group = next((group for group in groups if own in group), (own,))
    return tuple(dot + one for one in group if one == own or there(dot + one))
