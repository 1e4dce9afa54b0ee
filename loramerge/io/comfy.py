"""ComfyUI: diffusion_model.<original path> with lora_A/lora_B or lora_down/lora_up, and alpha."""

import re

from loramerge.adapter import Adapter, Extra
from loramerge.errors import AdapterError, listed
from loramerge.io._grammar import Grammar, scaled
from loramerge.io._layout import Draft, Given, Layout, Written
from loramerge.io._pipeline import agreed, alphas, carried, described, own_scale, pairs
from loramerge.io._products import full
from loramerge.io._source import Source

NAME = r"(?P<module>(?:diffusion_model(?!.*\.processor\.)|text_encoders)\..+?)"
GRAMMAR = Grammar(
    (
        ("A", re.compile(NAME + r"\.lora_A(?:(?:\.[^.]+)?\.weight)?")),
        ("A", re.compile(NAME + r"\.lora(?:_|\.)down\.weight")),
        ("B", re.compile(NAME + r"\.lora_B(?:(?:\.[^.]+)?\.weight)?")),
        ("B", re.compile(NAME + r"\.lora(?:_|\.)up\.weight")),
        ("alpha", re.compile(NAME + r"\.alpha")),
        ("dora_scale", re.compile(NAME + r"\.dora_scale")),
        ("diff", re.compile(NAME + r"\.diff")),
        ("diff_b", re.compile(NAME + r"\.diff_b")),
    )
)
DIFFERENCES = {"diff": "norm difference", "diff_b": "bias difference"}


def explains(key: str) -> bool:
    """Pairs below ComfyUI's names of models, and differences of weights, norms and biases."""
    return GRAMMAR.parse(key) is not None


def read(given: Given) -> Adapter:
    """Describe a file. Scale alpha / rank of the tensor, or 1 where it has no alpha.

    A difference of a weight is a module of full rank; those of norms and biases are kept beside.
    """
    own_scale(given)
    source, where = given.source, given.reference
    groups = GRAMMAR.group(source.tensors)
    extras = [
        Extra(key, DIFFERENCES[role], source.tensors[key])
        for roles in groups.values()
        for role in DIFFERENCES
        if (key := roles.get(role)) and not _of_weight(source, role, key)
    ]
    beside = {extra.key for extra in extras}
    updates = {
        name: kept
        for name, roles in groups.items()
        if (kept := {role: key for role, key in roles.items() if key not in beside})
    }
    whole = {name: roles for name, roles in updates.items() if "diff" in roles}
    if both := [name for name, roles in whole.items() if len(roles) > 1]:
        raise AdapterError(
            f"{where}: {listed(both, 4)} have a pair and a whole difference.", "remove one of them"
        )
    modules, _ = scaled(source, {n: r for n, r in updates.items() if n not in whole}, where)
    modules |= {name: full(name, roles, source.tensors)[0] for name, roles in whole.items()}
    return described(given, "comfy", modules, groups, extras=extras)


def _of_weight(source: Source, role: str, key: str) -> bool:
    """Whether a difference is one of a weight, which a module can be."""
    return role == "diff" and len(source.tensors[key].shape) > 1


def write(draft: Draft) -> Written:
    """Pairs lora_A and lora_B, with an alpha where the scale is not 1; that of a merge is."""
    scaled = alphas(module for module in draft.modules if module.scaling != 1)
    tensors = (*pairs(draft, "lora_A.weight", "lora_B.weight"), *scaled, *carried(draft))
    return Written(tensors, {"format": "pt", **agreed(draft)})


LAYOUT = Layout(
    name="comfy",
    summary="ComfyUI: diffusion_model.<path> of the original model, as Wan and others publish.",
    directory=False,
    explains=explains,
    read=read,
    write=write,
    naming="comfy",
    unscaled=True,
    scale="alphas",
)
