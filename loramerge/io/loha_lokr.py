"""PEFT's LoHa and LoKr: Hadamard and Kronecker products beside adapter_config.json."""

import re
from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from loramerge.adapter import Adapter, Module
from loramerge.errors import AdapterError
from loramerge.io._grammar import INCOMPLETE, Grammar
from loramerge.io._layout import Given, Layout
from loramerge.io._peft_config import Scale, scale_of
from loramerge.io._peft_keys import clean, saved_beside, tuned
from loramerge.io._products import hadamard, kronecker

NAME = r"(?P<module>.+?)"
KINDS = {"hada": hadamard, "lokr": kronecker}
GRAMMAR = Grammar(
    tuple(
        (f"{kind} {part}", re.compile(NAME + rf"\.{kind}_{part}(\.[^.]+)?"))
        for kind in KINDS
        for part in ("w1_a", "w1_b", "w1", "w2_a", "w2_b", "w2", "t1", "t2")
    )
)
KOHYA = re.compile(r"(lora|lycoris)_[^.]+\..+")


def explains(key: str) -> bool:
    """The parts of a product, and what PEFT saves beside them."""
    return marks(key) or saved_beside(key)


def marks(key: str) -> bool:
    """A part of a product; LyCORIS names modules otherwise."""
    return GRAMMAR.parse(key) is not None and KOHYA.fullmatch(key) is None


def read(given: Given) -> Adapter:
    """Describe an adapter: dW = alpha / r times the product, alpha and r from its config.

    Raises AdapterError where no config is there to say r, by which PEFT divides even where both
    factors of a LoKr are full.
    """
    source, where = given.source, given.reference
    config = given.config or {}
    if not isinstance(config.get("r"), int):
        raise AdapterError(
            f"{where}: its scale is alpha / r, and no adapter_config.json says r.",
            "name the directory that holds both files",
        )
    stated = {"lora_alpha": config["alpha"]} if "alpha" in config else {}
    scale = scale_of({**config, **stated}, given.alpha)
    modules = []
    for stored, roles in GRAMMAR.group(source.tensors).items():
        kind = next(iter(roles)).partition(" ")[0]
        own = {role.removeprefix(f"{kind} "): key for role, key in roles.items()}
        if not all(role.startswith(kind) for role in roles):
            raise AdapterError(f"{where}: {stored} is of two kinds.", INCOMPLETE)
        module, _ = KINDS[kind](clean(stored), own, source.tensors)
        modules.append(replace(module, scaling=_scaling(scale, config, module)))
    return tuned(given, "loha_lokr", modules)


def _scaling(scale: Scale, config: Mapping[str, Any], module: Module) -> float:
    """Alpha / r by the config; the rank of a product is another."""
    rank = int(scale.ranks.get(module.name, config["r"]))
    return scale.of(module.name, rank)


LAYOUT = Layout(
    name="loha_lokr",
    summary="PEFT's LoHa and LoKr. Written as PEFT.",
    directory=True,
    explains=explains,
    read=read,
    marks=marks,
    writes="peft",
)
