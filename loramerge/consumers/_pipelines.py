"""Diffusers, which loads adapters of image and video pipelines."""

import re
from collections import Counter

from loramerge.adapter import Adapter
from loramerge.consumers._verdict import PER_MODULE, Verdict, compared, left_out

__all__ = ["diffusers"]

PIPELINES = ("comfy", "diffusers", "kohya", "xlabs")
# Names that kohya gives to layers of Flux, and those of them that are found in its files.
FLUX = re.compile(r"lora_unet_(double|single)_blocks_")
IN_FLUX = re.compile(rf"{FLUX.pattern}|lora_te1?_")
# Names of other transformers, whose scales are folded one by one as those of Flux are.
FOLDED = re.compile(r"lora_unet_((transformer_)?blocks|layers)_")
# Stable Diffusion 3 in kohya's words, which are not among those it translates.
UNKNOWN = re.compile(r"lora_unet_joint_blocks_")
TO_DIFFUSERS = "loramerge convert {0} --to diffusers"


def diffusers(adapter: Adapter, max_rank: int) -> Verdict:
    """Alpha / rank of each module, but for a kohya file of a UNet; DoRA is left out."""
    if adapter.layout not in PIPELINES:
        return Verdict("refused", f"the {adapter.layout} layout", TO_DIFFUSERS)
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
        found = compared(adapter, _common(adapter), "the most common alpha / rank", TO_DIFFUSERS)
    return found or Verdict("right", PER_MODULE)


def _common(adapter: Adapter) -> dict[str, float]:
    """The scales where UNet and text encoders each have the alpha most of their modules have."""
    parts: dict[str, list[str]] = {}
    for name in adapter.modules:
        parts.setdefault("_".join(name.split("_", 2)[:2]), []).append(name)
    used = {}
    for names in parts.values():
        keys = [f"{name}.alpha" for name in names]
        stored = [adapter.source.array(key) for key in keys if key in adapter.source.tensors]
        alphas = Counter(float(alpha.item()) for alpha in stored)
        for name in names:
            rank = adapter.modules[name].rank
            used[name] = alphas.most_common(1)[0][0] / rank if alphas else 1.0
    return used
