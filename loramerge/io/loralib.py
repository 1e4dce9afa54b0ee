"""loralib and OpenDelta: parameters lora_A [r, in] and lora_B [out, r], with no `.weight`."""

import re
from collections.abc import Mapping

from msgspec.structs import replace

from loramerge._lazy import np
from loramerge.adapter import Adapter, LowRank, Module, TensorSource
from loramerge.errors import AdapterError
from loramerge.io._grammar import Grammar, check_pairs, kind_of, pair
from loramerge.io._layout import Given, Layout
from loramerge.io._pipeline import PREFIXED
from loramerge.io._source import Source

# OpenDelta calls the layer that holds them `lora`.
NAME = rf"(?!{PREFIXED.pattern})(?P<module>.+?)(?:\.lora)?"
GRAMMAR = Grammar(
    (
        ("A", re.compile(NAME + r"\.lora_A")),
        ("B", re.compile(NAME + r"\.lora_B")),
    )
)
# A fused projection of queries, keys and values, all of them adapted.
EVERY_PART = 3


def explains(key: str) -> bool:
    """The two factors, as lora_state_dict saves them."""
    return GRAMMAR.parse(key) is not None


def read(given: Given) -> Adapter:
    """Describe a state dict: dW = alpha / r B A; alpha is not in it, --alpha says it.

    MergedLinear has a pair for each part of a fused layer, A [3 r, in] and B [out, r] of three:
    read as one pair of rank 3 r. Raises AdapterError where some part is left out, as the file does
    not say which.
    """
    source, where = given.source, given.reference
    groups = GRAMMAR.group(source.tensors)
    check_pairs(groups, "A", "B", where)
    modules = {}
    for name, roles in groups.items():
        module, rank = _module(source, name, roles)
        modules[name] = replace(module, scaling=given.alpha / rank if given.alpha else 1.0)
    silent = given.alpha is None
    return Adapter(
        reference=where,
        layout="loralib",
        modules=modules,
        source=source,
        metadata=source.metadata,
        assumed=("scale 1: the file does not say its alpha (--alpha N sets it)",) if silent else (),
        scale_assumed=silent,
    )


def _module(source: Source, name: str, roles: Mapping[str, str]) -> tuple[Module, int]:
    """A module, and the r that divides alpha."""
    A, B = source.tensors[roles["A"]], source.tensors[roles["B"]]
    parts = A.shape[0] // B.shape[-1] if len(A.shape) == len(B.shape) == 2 else 1
    if parts == EVERY_PART - 1:
        raise AdapterError(
            f"{roles['A']} {list(A.shape)} and {roles['B']} {list(B.shape)} adapt two parts of a "
            "fused layer, and which is not stored.",
            "save its delta weights as a layer each, with loralib's merge_weights",
        )
    if parts != EVERY_PART or A.shape[0] % EVERY_PART or B.shape[0] % EVERY_PART:
        return pair(name, roles, A, B, kind_of(name)), A.shape[0]
    whole = replace(B, shape=(B.shape[0], A.shape[0]))
    return replace(pair(name, roles, A, whole, "linear"), form=_merged), B.shape[1]


def _merged(source: TensorSource, module: Module) -> LowRank:
    """A of all parts, and their B along a diagonal."""
    A, stored = (source.array(module.keys[part]) for part in ("A", "B"))
    B = np.zeros((module.out_features, module.rank), stored.dtype)
    rows, rank = module.out_features // EVERY_PART, stored.shape[1]
    for part in range(EVERY_PART):
        own = slice(part * rows, (part + 1) * rows)
        B[own, part * rank : (part + 1) * rank] = stored[own]
    return LowRank(A, B)


LAYOUT = Layout(
    name="loralib",
    summary="loralib and OpenDelta: parameters without .weight, scale by --alpha. Written as PEFT.",
    directory=False,
    explains=explains,
    read=read,
    writes="peft",
)
