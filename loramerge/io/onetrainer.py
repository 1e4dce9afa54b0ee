"""OneTrainer's OMI: the original implementation's paths below diffusers' names of components."""

import re

from loramerge.adapter import Adapter
from loramerge.errors import IncompatibleError, listed
from loramerge.io._grammar import Grammar, scaled
from loramerge.io._layout import Draft, Given, Layout, Written
from loramerge.io._pipeline import (
    BUNDLED,
    COMPONENT,
    ORIGINAL,
    agreed,
    alphas,
    bundled,
    carried,
    described,
    own_scale,
    pairs,
)

NAME = rf"(?P<module>(?:{COMPONENT}|(?:clip_l|clip_g|t5)\.).+?)"
GRAMMAR = Grammar(
    (
        ("A", re.compile(rf"{NAME}\.(?:lora_down|lora_A)\.weight")),
        ("B", re.compile(rf"{NAME}\.(?:lora_up|lora_B)\.weight")),
        ("alpha", re.compile(rf"{NAME}\.alpha")),
        ("dora_scale", re.compile(rf"{NAME}\.dora_scale")),
    )
)


def explains(key: str) -> bool:
    """Pairs and alphas below the name of a component."""
    return GRAMMAR.parse(key) is not None or key.startswith(BUNDLED)


def marks(key: str) -> bool:
    """A path of the original implementation below a component of diffusers'."""
    return re.match(ORIGINAL, key) is not None and explains(key)


def read(given: Given) -> Adapter:
    """Describe a file. Parts of a fused layer are counted: qkv.0 is the query's."""
    own_scale(given)
    groups = GRAMMAR.group(given.source.tensors)
    modules, silent = scaled(given.source, groups, given.reference)
    extras = bundled(given.source)
    return described(given, "onetrainer", modules, groups, extras=extras, silent=silent)


def write(draft: Draft) -> Written:
    """Pairs with an alpha each; the parts of a fused layer stay apart.

    Raises IncompatibleError for models whose original paths are diffusers' own: nothing would tell
    the file from one of diffusers.
    """
    if not any(re.match(ORIGINAL, module.name) for module in draft.modules):
        raise IncompatibleError(
            "OneTrainer's OMI takes the original implementation's paths, of which these modules "
            f"have none: {listed([module.name for module in draft.modules], 3)}.",
            "OneTrainer reads diffusers too: --to diffusers",
        )
    factors = pairs(draft, "lora_down.weight", "lora_up.weight")
    tensors = (*factors, *alphas(draft.modules), *carried(draft))
    return Written(tensors, {"format": "pt", **agreed(draft)})


LAYOUT = Layout(
    name="onetrainer",
    summary="OneTrainer's OMI, with original paths; its other formats are kohya's, comfy's and "
    "diffusers'.",
    directory=False,
    explains=explains,
    read=read,
    write=write,
    marks=marks,
    naming="onetrainer",
    unscaled=True,
    scale="alphas",
)
