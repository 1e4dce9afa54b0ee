"""PEFT's AdaLoRA: lora_A [r, in], lora_B [out, r] and the singular values lora_E [r, 1]."""

import math
import re
from collections.abc import Mapping

from msgspec.structs import replace

from loramerge.adapter import Adapter, Module
from loramerge.errors import AdapterError
from loramerge.io._grammar import INCOMPLETE, Grammar, check_owners, check_pairs, pair
from loramerge.io._layout import Given, Layout
from loramerge.io._peft_config import scale_of
from loramerge.io._peft_keys import clean, saved_beside, tuned
from loramerge.io._source import Source

NAME, LABEL = r"(?P<module>.+?)", r"(\.(?!weight$)[^.]+)?"
GRAMMAR = Grammar(
    tuple(
        (role, re.compile(NAME + rf"\.lora_{letter}" + LABEL))
        for role, letter in (("A", "A"), ("B", "B"), ("E", "E"))
    )
)
# PEFT adds this to the rank it divides alpha by.
EPSILON = 1e-5


def explains(key: str) -> bool:
    """The three parts of a module, and what PEFT saves beside them."""
    return GRAMMAR.parse(key) is not None or saved_beside(key)


def marks(key: str) -> bool:
    """Singular values: what no other layout has. Their file's other pairs have them too."""
    parsed = GRAMMAR.parse(key)
    return parsed is not None and parsed[1] == "E"


def read(given: Given) -> Adapter:
    """Describe an adapter: dW = alpha / (r + 1e-5) B diag(E) A, with r the stored rank.

    PEFT saves only the ranks its schedule left. Those whose E is zero are gone too.
    """
    source, where = given.source, given.reference
    groups = GRAMMAR.group(source.tensors)
    check_pairs(groups, "A", "B", where)
    check_pairs(groups, "A", "E", where)
    check_owners(groups, "A", where)
    config = given.config or {}
    stated = "lora_alpha" in config or given.alpha is not None
    alpha = scale_of(config, given.alpha).alpha if stated else None
    modules = [_module(source, name, roles, alpha) for name, roles in groups.items()]
    found = {module.name: module for module in modules if module.rank}
    if not found:
        raise AdapterError(f"{where}: every singular value is zero.", "train it longer")
    closed = len(modules) - len(found)
    notes = [f"no rank is left in {closed} modules: they are gone"] if closed else []
    if alpha is None:
        notes.append("scale 1: the file does not say its alpha (--alpha N sets it)")
    parts = [key for roles in groups.values() for key in roles.values()]
    return tuned(given, "adalora", found.values(), parts, notes=notes, scale_assumed=alpha is None)


def _module(source: Source, name: str, roles: Mapping[str, str], alpha: float | None) -> Module:
    A, B = source.tensors[roles["A"]], source.tensors[roles["B"]]
    module = pair(clean(name), roles, A, B, "linear")
    values = source.scalars(roles["E"])
    if len(values) != module.rank or not all(map(math.isfinite, values)):
        raise AdapterError(
            f"{roles['E']} holds {len(values)} values for rank {module.rank}, or NaN or Inf.",
            INCOMPLETE,
        )
    scaling = 1.0 if alpha is None else alpha / (module.rank + EPSILON)
    rank = sum(value != 0 for value in values)
    return replace(module, rank=rank, scaling=scaling, gates=values)


LAYOUT = Layout(
    name="adalora",
    summary="PEFT's AdaLoRA: pairs with singular values between them. Written as PEFT.",
    directory=True,
    explains=explains,
    read=read,
    marks=marks,
    writes="peft",
)
