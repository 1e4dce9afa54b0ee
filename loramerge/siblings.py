"""Which modules of a model read the same input, told by their names."""

from collections.abc import Collection

__all__ = ["siblings"]

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


def siblings(name: str, names: Collection[str]) -> tuple[str, ...]:
    """The other modules among `names` that read what `name` reads, in the order of the groups.

    They stand under one parent. A name that is in no group has none.
    """
    parent, _, own = name.rpartition(".")
    crossed = any(word in parent.lower() for word in CROSS)
    groups = (*GATES, *(group[1:] if crossed else group for group in ATTENTION))
    dot = f"{parent}." if parent else ""
    found = [dot + other for group in groups if own in group for other in group if other != own]
    return tuple(other for other in found if other in names)
