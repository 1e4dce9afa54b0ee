"""Diffusers, which loads adapters of image and video pipelines."""

import re
from collections import Counter

from loramerge.adapter import Adapter
from loramerge.consumers._verdict import PER_MODULE, Verdict, another_layout, compared, left_out

__all__ = ["diffusers"]

PIPELINES = ("comfy", "diffusers", "kohya", "xlabs")
# Names that kohya gives to layers of Flux, and those of them that are found in its files.
FLUX = re.compile(r"lora_unet_(double|single)_blocks_")
IN_FLUX = re.compile(rf"{FLUX.pattern}|lora_te1?_")
# Names of other transformers, whose scales are folded one by one as those of Flux are.
FOLDED = re.compile(r"lora_unet_((transformer_)?blocks|layers)_")
# Stable Diffusion 3 in kohya's words, which are not among those it translates.
UNKNOWN = re.compile(r"lora_unet_joint_blocks_")
ONE_ALPHA = "loramerge cat {0} -o portable.safetensors"
TO_DIFFUSERS = "loramerge convert {0} --to diffusers"


def diffusers(adapter: Adapter, max_rank: int) -> Verdict:
    """Alpha / rank of each module, but for a kohya file of a UNet; DoRA is left out."""
    if adapter.layout not in PIPELINES:
        return another_layout(adapter, "diffusers")
    if adapter.variants:
        first = adapter.variants[0]
        return Verdict("wrong scale", f"{first.name} is left out", first.hint)
    found = None
    if adapter.layout == "kohya" and any(map(UNKNOWN.match, adapter.modules)):
        return Verdict("refused", "it reads no kohya file of Stable Diffusion 3", TO_DIFFUSERS)
    if adapter.layout == "kohya" and any(map(FLUX.match, adapter.modules)):
        outside = [name for name in adapter.modules if not IN_FLUX.match(name)]
        found = left_out(outside, adapter, "from a kohya file it loads no {}", TO_DIFFUSERS)
    elif adapter.layout == "kohya" and not any(map(FOLDED.match, adapter.modules)):
        found = compared(adapter, _common(adapter), "the most common alpha / rank", ONE_ALPHA)
    return found or Verdict("right", PER_MODULE)


def _common(adapter: Adapter) -> dict[str, float]:
    """The scales where UNet and text encoders each have the alpha most of their modules have."""
    parts: dict[str, list[str]] = {}
    for name in adapter.modules:
        parts.setdefault("_".join(name.split("_", 2)[:2]), []).append(name)
    used = {}
    for names in parts.values():
        alphas = Counter(alpha for name in names if (alpha := _stored(adapter, name)) is not None)
        for name in names:
            rank = adapter.modules[name].rank
            used[name] = alphas.most_common(1)[0][0] / rank if alphas else 1.0
    return used


def _stored(adapter: Adapter, name: str) -> float | None:
    """The alpha of a module as it is stored: 0, which means scale 1 to kohya, is 0 here."""
    key = f"{name}.alpha"
    if key not in adapter.source.tensors:
        return None
    module = adapter.modules[name]
    return round(module.scaling * module.rank, 6) if any(adapter.source.read(key)) else 0.0
