"""PEFT's VeRA: two vectors a module, vera_lambda_d [r] and vera_lambda_b [out], and shared A, B."""

import re
from collections.abc import Mapping

from loramerge.adapter import Adapter, LowRank, Module, TensorSource
from loramerge.errors import AdapterError, UsageError, listed
from loramerge.io._grammar import Grammar, check_owners, check_pairs
from loramerge.io._layout import Given, Layout
from loramerge.io._peft_keys import clean, saved_beside, tuned
from loramerge.io._source import Source

NAME, LABEL = r"(?P<module>.+?)", r"(\.[^.]+)?"
GRAMMAR = Grammar(
    (
        ("d", re.compile(NAME + r"\.vera_lambda_d" + LABEL)),
        ("b", re.compile(NAME + r"\.vera_lambda_b" + LABEL)),
    )
)
SHARED = re.compile(r"base_model\.vera_(?P<module>[AB])" + LABEL)
# The layers of a transformer that read the hidden state itself, by the last part of their names.
# How wide the input of another is, the file does not say.
READ_HIDDEN = frozenset(
    (
        *("q_proj", "k_proj", "v_proj", "qkv_proj", "query", "key", "value", "query_key_value"),
        *("c_attn", "Wqkv", "qkv", "gate_proj", "up_proj", "gate_up_proj", "fc1", "c_fc"),
    )
)


def explains(key: str) -> bool:
    """The vectors, the shared matrices, and what PEFT saves beside them."""
    own = GRAMMAR.parse(key) is not None or SHARED.fullmatch(key) is not None
    return own or saved_beside(key)


def marks(key: str) -> bool:
    """A vector or a shared matrix: what no other layout has."""
    return GRAMMAR.parse(key) is not None or SHARED.fullmatch(key) is not None


def read(given: Given) -> Adapter:
    """Describe an adapter: dW = diag(b) B[:out] diag(d) A[:, :in], an exact LoRA of rank r.

    A and B are as wide as the widest module. Raises AdapterError where they are not in the file,
    and where modules may differ in the width of their inputs, which only the base model knows.
    """
    source, where = given.source, given.reference
    if given.alpha is not None:
        raise UsageError(f"{where}: VeRA has no alpha.", "leave --alpha out")
    groups = GRAMMAR.group(source.tensors)
    check_pairs(groups, "d", "b", where)
    shared = {m["module"]: key for key in source.tensors if (m := SHARED.fullmatch(key))}
    if set(shared) != {"A", "B"}:
        raise AdapterError(
            f"{where} does not hold vera_A and vera_B, which its vectors scale.",
            "complete it from a file that holds them, as PEFT saves with save_projection=True: "
            "loramerge convert ADAPTER --to peft --shared FILE",
        )
    check_owners(groups, "d", where)
    leaves = {name.rpartition(".")[2] for name in groups}
    if len(leaves) > 1 and not leaves <= READ_HIDDEN:
        raise AdapterError(
            f"{where}: how wide the inputs of {listed(sorted(leaves - READ_HIDDEN))} are, only the "
            "base model says.",
            "convert it in PEFT: peft.save_as_lora('converted', model, rank=16)",
        )
    modules = [_module(source, name, roles, shared) for name, roles in groups.items()]
    return tuned(given, "vera", modules)


def _module(
    source: Source, name: str, roles: Mapping[str, str], shared: Mapping[str, str]
) -> Module:
    keys = {**shared, **roles}
    A, B, d, b = (source.tensors[keys[role]] for role in ("A", "B", "d", "b"))
    flat = all(len(matrix.shape) == 2 for matrix in (A, B)) and len(d.shape) == len(b.shape) == 1
    rank, width = A.shape if flat else (0, 0)
    if not flat or d.shape != (rank,) or B.shape[1] != rank or b.shape[0] > B.shape[0]:
        raise AdapterError(
            f"{roles['d']} {list(d.shape)} and {roles['b']} {list(b.shape)} do not fit vera_A "
            f"{list(A.shape)} and vera_B {list(B.shape)}.",
            "save the adapter again",
        )
    return Module(
        name=clean(name),
        kind="linear",
        out_features=b.shape[0],
        in_features=width,
        rank=rank,
        scaling=1.0,
        dtype=d.dtype,
        keys=keys,
        form=_scaled,
    )


def _scaled(source: TensorSource, module: Module) -> LowRank:
    """The shared matrices, cut to the module and scaled by its vectors."""
    A, B, d, b = (source.array(module.keys[role]) for role in ("A", "B", "d", "b"))
    return LowRank(A=d[:, None] * A, B=b[:, None] * B[: module.out_features])


LAYOUT = Layout(
    name="vera",
    summary="PEFT's VeRA with its projections: scaled shared matrices. Written as PEFT.",
    directory=True,
    explains=explains,
    read=read,
    marks=marks,
    writes="peft",
)
