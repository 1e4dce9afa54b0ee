"""Diffusers, which loads adapters of image and video pipelines."""

import re
from collections import Counter

from loramerge.adapter import Adapter
from loramerge.consumers._verdict import (
    PER_MODULE,
    Verdict,
    another_layout,
    compared,
    converting,
    left_out,
)
from loramerge.errors import listed
from loramerge.io._names import family_of

__all__ = ["diffusers"]

PIPELINES = ("comfy", "diffusers", "kohya", "xlabs")
# Names that kohya gives to layers of Flux, and those of them that are found in its files.
FLUX = re.compile(r"lora_unet_(double|single)_blocks_")
IN_FLUX = re.compile(rf"{FLUX.pattern}|lora_te1?_")
# Names of other transformers, whose scales are folded one by one as those of Flux are.
FOLDED = re.compile(r"lora_unet_((transformer_)?blocks|layers)_")
# Families of which it reads no kohya file.
NO_KOHYA = ("HunyuanVideo", "Stable Diffusion 3")
# ComfyUI's files that it reads, by family: of lora_down, of lora_A, of lora_A and alphas.
DOWN, PLAIN, SCALED = "lora_down", "lora_A", "lora_A and alphas"
COMFY = {
    "Flux": (DOWN,),
    "Flux.2": (PLAIN,),
    "HunyuanVideo": (PLAIN,),
    "Qwen-Image": (DOWN, PLAIN, SCALED),
    "Wan": (DOWN, PLAIN, SCALED),
    "Z-Image": (DOWN, PLAIN),
}
# Layers that it finds in such files; of a family that is not here, all.
IN_COMFY = {
    "Flux": re.compile(r"diffusion_model\.(double|single)_blocks\."),
    "Wan": re.compile(r"diffusion_model\.blocks\."),
    "Z-Image": re.compile(r".*(?<!\.qkv|\.out)$"),
}
ONE_ALPHA = "loramerge cat {0} -o portable.safetensors"


def diffusers(adapter: Adapter, max_rank: int) -> Verdict:
    """Alpha / rank of each module, but for a kohya file of a UNet; DoRA is left out."""
    if adapter.layout not in PIPELINES:
        return another_layout(adapter, "diffusers")
    if adapter.variants:
        first = adapter.variants[0]
        return Verdict("wrong scale", f"{first.name} is left out", first.hint)
    remedy = converting(adapter, "diffusers")
    if adapter.layout == "comfy":
        return _comfy(adapter, remedy)
    found = None
    if adapter.layout == "kohya" and (family := family_of(adapter)) in NO_KOHYA:
        return Verdict("refused", f"it reads no kohya file of {family}", remedy)
    if adapter.layout == "kohya" and family == "Wan" and (silent := _silent(adapter)):
        reason = f"it wants an alpha for each module of Wan, also for {listed(silent, 2)}"
        return Verdict("refused", reason, remedy)
    if adapter.layout == "kohya" and any(map(FLUX.match, adapter.modules)):
        outside = [name for name in adapter.modules if not IN_FLUX.match(name)]
        found = left_out(outside, adapter, "from a kohya file it loads no {}", remedy)
    elif adapter.layout == "kohya" and not any(map(FOLDED.match, adapter.modules)):
        found = compared(adapter, _common(adapter), "the most common alpha / rank", ONE_ALPHA)
    return found or Verdict("right", PER_MODULE)


def _comfy(adapter: Adapter, remedy: str) -> Verdict:
    """What it makes of original names depends on the family, and on how factors are called."""
    family, keys = family_of(adapter), adapter.source.tensors
    spelling = SCALED if any(key.endswith(".alpha") for key in keys) else PLAIN
    if any(".lora_down." in key for key in keys):
        spelling = DOWN
    if spelling not in COMFY.get(family, ()):
        reason = f"it reads no ComfyUI file of {family or 'these models'} with {spelling}"
        return Verdict("refused", reason, remedy)
    inside = IN_COMFY.get(family)
    missed = [name for name in adapter.modules if inside and not inside.match(name)]
    found = left_out(missed, adapter, "from a ComfyUI file it loads no {}", remedy)
    return found or Verdict("right", PER_MODULE)


def _silent(adapter: Adapter) -> list[str]:
    """The modules without a stored alpha."""
    return [name for name in adapter.modules if f"{name}.alpha" not in adapter.source.tensors]


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
