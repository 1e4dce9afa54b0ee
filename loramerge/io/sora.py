"""SoRA checkpoints (OpenDelta): lora.lora_A [r, in], lora.lora_B [out, r] and lora.gate [1, r]."""

import math
import re
from collections.abc import Mapping

from msgspec.structs import replace

from loramerge.adapter import Adapter, Extra, Module
from loramerge.errors import AdapterError
from loramerge.io._grammar import Grammar, check_owners, check_pairs, pair
from loramerge.io._layout import Given, Layout
from loramerge.io._source import Source

NAME = r"(?P<module>.+)"
GRAMMAR = Grammar(
    (
        ("A", re.compile(NAME + r"\.lora\.lora_A")),
        ("B", re.compile(NAME + r"\.lora\.lora_B")),
        ("gate", re.compile(NAME + r"\.lora\.gate")),
    )
)


def explains(key: str) -> bool:
    """Any key: a checkpoint holds what was trained beside the gated pairs under its own name."""
    return True


def marks(key: str) -> bool:
    """A gate: what no other layout has."""
    return key.endswith(".lora.gate")


def read(given: Given) -> Adapter:
    """Describe a checkpoint: dW = alpha / r B diag(gate) A, with r the stored rank.

    A module's rank counts its open gates; a module without one is no part of the adapter. alpha is
    not in the file: --alpha says it.
    """
    source, where = given.source, given.reference
    groups = GRAMMAR.group(source.tensors)
    check_pairs(groups, "A", "B", where)
    check_owners(groups, "A", where)
    modules = [_module(source, name, roles, given.alpha) for name, roles in groups.items()]
    closed = [module.name for module in modules if module.rank == 0]
    notes = [f"every gate is closed in {len(closed)} modules: they are gone"] if closed else []
    if given.alpha is None:
        notes.append("scale 1: a SoRA checkpoint does not say its alpha (--alpha N sets it)")
    found = {module.name: module for module in modules if module.rank}
    if not found:
        raise AdapterError(
            f"{where}: every gate of every module is closed.", "train it less sparse"
        )
    return Adapter(
        reference=where,
        layout="sora",
        modules=found,
        source=source,
        extras=tuple(
            Extra(key, "saved module", info)
            for key, info in source.tensors.items()
            if GRAMMAR.parse(key) is None
        ),
        metadata=source.metadata,
        assumed=tuple(notes),
        scale_assumed=given.alpha is None,
    )


def _module(source: Source, name: str, roles: Mapping[str, str], alpha: float | None) -> Module:
    A, B = source.tensors[roles["A"]], source.tensors[roles["B"]]
    module = pair(name, roles, A, B, "linear")
    gates = source.scalars(roles["gate"]) if "gate" in roles else (1.0,) * module.rank
    if len(gates) != module.rank or not all(math.isfinite(gate) for gate in gates):
        raise AdapterError(
            f"{roles['gate']} holds {len(gates)} gates for rank {module.rank}, or NaN or Inf.",
            "save the checkpoint again",
        )
    scaling = alpha / module.rank if alpha else 1.0
    return replace(module, rank=sum(g != 0 for g in gates), scaling=scaling, gates=gates)


LAYOUT = Layout(
    name="sora",
    summary="SoRA checkpoints of OpenDelta: pairs with a gate. Written as PEFT.",
    directory=True,
    explains=explains,
    read=read,
    marks=marks,
    writes="peft",
)
