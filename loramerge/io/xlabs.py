"""XLabs x-flux: pairs of attention processors, qkv_lora1.down and qkv_lora1.up, with scale 1."""

import re

from loramerge.adapter import Adapter
from loramerge.io._grammar import Grammar, scaled
from loramerge.io._layout import Draft, Given, Layout, Written
from loramerge.io._pipeline import agreed, own_scale, pairs

NAME = (
    r"(?:diffusion_model\.)?(?P<module>double_blocks\.\d+\.processor\.(?:qkv|proj)_lora[12]"
    r"|single_blocks\.\d+\.processor\.(?:qkv|proj)_lora)"
)
GRAMMAR = Grammar(
    (
        ("A", re.compile(NAME + r"\.down\.weight")),
        ("B", re.compile(NAME + r"\.up\.weight")),
    )
)


def explains(key: str) -> bool:
    """The pairs of a processor; ComfyUI's prefix makes no difference."""
    return GRAMMAR.parse(key) is not None


def read(given: Given) -> Adapter:
    """Describe a file: B @ A as it is stored."""
    own_scale(given)
    source = given.source
    modules, _ = scaled(source, GRAMMAR.group(source.tensors), given.reference)
    return Adapter(
        reference=given.reference,
        layout="xlabs",
        modules=modules,
        source=source,
        naming="xlabs",
        metadata=source.metadata,
        base_model="flux1",
    )


def write(draft: Draft) -> Written:
    """Pairs of one rank, which x-flux takes from the first, with scale 1."""
    tensors = tuple(pairs(draft, "down.weight", "up.weight"))
    return Written(tensors, {"format": "pt", **agreed(draft)})


LAYOUT = Layout(
    name="xlabs",
    summary="XLabs x-flux: adapters of Flux's attention processors.",
    directory=False,
    explains=explains,
    read=read,
    write=write,
    naming="xlabs",
    one_rank=True,
    unscaled=True,
)
