"""LoRA-XS and its kin (LoRA-SB, Fed-SB): frozen lora_A and lora_B with a trained r x r core."""

import re

from msgspec.structs import replace

from loramerge.adapter import Adapter, LowRank, Module, TensorSource
from loramerge.errors import AdapterError
from loramerge.io._grammar import INCOMPLETE, Grammar, check_owners, check_pairs, pair
from loramerge.io._layout import Given, Layout
from loramerge.io._peft_config import scale_of
from loramerge.io._peft_keys import clean, saved_beside, tuned

NAME, LABEL = r"(?P<module>.+?)", r"(\.[^.]+)?"
GRAMMAR = Grammar(
    (
        ("A", re.compile(NAME + r"\.lora_A" + LABEL + r"\.weight")),
        ("B", re.compile(NAME + r"\.lora_B" + LABEL + r"\.weight")),
        # PEFT takes `.default` out of every key it saves, here out of a name.
        ("core", re.compile(NAME + r"(\.default)?_lora_latent(_mapping)?(\.weight)?")),
    )
)


def explains(key: str) -> bool:
    """The three parts of a module, and what PEFT saves beside them."""
    return GRAMMAR.parse(key) is not None or saved_beside(key)


def marks(key: str) -> bool:
    """A core: what no other layout has."""
    parsed = GRAMMAR.parse(key)
    return parsed is not None and parsed[1] == "core"


def read(given: Given) -> Adapter:
    """Describe an adapter: dW = alpha / r B R A (arXiv:2405.17604).

    Adapters of one base share A and B: their sum has rank r again, and is the sum of their cores.
    """
    source, where = given.source, given.reference
    groups = GRAMMAR.group(source.tensors)
    check_pairs(groups, "A", "B", where)
    check_pairs(groups, "A", "core", where)
    check_owners(groups, "A", where)
    config = given.config or {}
    stated = "lora_alpha" in config or given.alpha is not None
    scale = scale_of(config, given.alpha) if stated else None
    modules = []
    for stored, roles in groups.items():
        A, B, core = (source.tensors[roles[role]] for role in ("A", "B", "core"))
        module = pair(clean(stored), roles, A, B, "linear")
        if core.shape != (module.rank, module.rank):
            raise AdapterError(
                f"{roles['core']} is {list(core.shape)}, not rank by rank ({module.rank}).",
                INCOMPLETE,
            )
        scaling = scale.of(module.name, module.rank) if scale else 1.0
        modules.append(replace(module, scaling=scaling, form=_cored))
    notes = () if stated else ("scale 1: the file does not say its alpha (--alpha N sets it)",)
    return tuned(given, "loraxs", modules, notes=notes, scale_assumed=not stated)


def _cored(source: TensorSource, module: Module) -> LowRank:
    """A, and B times the core."""
    A, B, core = (source.array(module.keys[role]) for role in ("A", "B", "core"))
    return LowRank(
        A=A.reshape(module.rank, module.in_features),
        B=B.reshape(module.out_features, module.rank) @ core,
    )


LAYOUT = Layout(
    name="loraxs",
    summary="LoRA-XS, LoRA-SB, Fed-SB: frozen factors with an r x r core. Written as PEFT.",
    directory=True,
    explains=explains,
    read=read,
    marks=marks,
    writes="peft",
)
