"""diffusers' converters of whole checkpoints as a judge of every row of our tables.

A checkpoint whose weights are the B factors of an adapter, one column each: what the converter
renames, cuts and turns around must be what we make of the adapter.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils as converters
from safetensors.torch import save_file

from loramerge.io._names import families, renamed
from loramerge.io._names._table import Row
from loramerge.io._open import open_adapter

FAMILIES = {family.name: family for family in families()}
# The converters of Flux and HunyuanVideo know but one width.
WIDTHS = {"Flux": 3072, "HunyuanVideo": 3072}
CONVERTERS: dict[str, Callable[..., dict[str, torch.Tensor]]] = {
    "Flux": converters.convert_flux_transformer_checkpoint_to_diffusers,
    "Flux.2": converters.convert_flux2_transformer_checkpoint_to_diffusers,
    "HunyuanVideo": converters.convert_hunyuan_video_transformer_to_diffusers,
    "Stable Diffusion 3": converters.convert_sd3_transformer_checkpoint_to_diffusers,
    "Stable Diffusion 1 or 2": converters.convert_ldm_unet_checkpoint,
    "Stable Diffusion XL": converters.convert_ldm_unet_checkpoint,
    "Wan": converters.convert_wan_transformer_to_diffusers,
    "Z-Image": converters.convert_z_image_transformer_checkpoint_to_diffusers,
}
UNET = {"layers_per_block": 2}
CONFIGS = {
    "Stable Diffusion 1 or 2": {"config": UNET},
    "Stable Diffusion XL": {"config": {**UNET, "addition_embed_type": "text_time"}},
}
# The last of two joint blocks uses its text stream only for attention.
LAST = re.compile(r"joint_blocks\.1\.context_block\.(attn\.proj|mlp\..*)")
# Versions 1 and 2 have no label.
ABSENT = {"Stable Diffusion 1 or 2": re.compile(r"label_emb\..*"), "Stable Diffusion 3": LAST}


class Checkpoint(dict[str, torch.Tensor]):
    """Norms and the like, which no adapter has, are there as well."""

    def pop(self, key: str, *default: torch.Tensor) -> torch.Tensor:
        return super().pop(key) if key in self else torch.zeros(6)


def layers(name: str) -> Iterator[tuple[str, Row]]:
    """Every row of a family's denoiser for two blocks of each kind, by its original name."""
    denoiser = FAMILIES[name].components[0]
    for row in denoiser.spellings["comfy"][0].rows:
        for number in ("0", "1") if row.name.count("{}") else ("",):
            filled = row.name.replace("{}", number)
            if name in ABSENT and ABSENT[name].fullmatch(filled):
                continue
            yield filled, row


def factors(name: str, width: int) -> dict[str, torch.Tensor]:
    """B [rows, 1] of every layer."""
    draw = torch.Generator().manual_seed(5)
    found = {}
    for layer, row in layers(name):
        last = layer == "joint_blocks.1.context_block.adaLN_modulation.1"
        rows = sum(row.shares) if row.shares else 2 if layer.startswith("final") or last else 6
        found[layer] = torch.randn(rows * width, 1, generator=draw)
    return found


@pytest.mark.parametrize("name", CONVERTERS)
def test_an_adapter_is_translated_as_diffusers_converts_the_checkpoint(
    name: str, tmp_path: Path
) -> None:
    width = WIDTHS.get(name, 4)
    stored = factors(name, width)
    tensors = {}
    for layer, B in stored.items():
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = B
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = torch.ones(1, width)
    save_file(tensors, tmp_path / "a.safetensors", {"modelspec.architecture": called(name)})
    ours = renamed(open_adapter(str(tmp_path / "a.safetensors")), "diffusers")

    unet = "model.diffusion_model." if "config" in CONFIGS.get(name, {}) else ""
    checkpoint = Checkpoint({f"{unet}{layer}.weight": B for layer, B in stored.items()})
    checkpoint |= {f"{unet}{layer}.bias": torch.zeros(len(B)) for layer, B in stored.items()}
    component = FAMILIES[name].components[0].name
    theirs = {
        f"{component}.{key.removesuffix('.weight')}": weight
        for key, weight in CONVERTERS[name](checkpoint, **CONFIGS.get(name, {})).items()
        if key.endswith(".weight") and weight.ndim > 1
    }
    assert set(ours.modules) == set(theirs)
    for module, weight in theirs.items():
        np.testing.assert_array_equal(ours.read(module).B, weight.numpy(), err_msg=module)


def called(name: str) -> str:
    """What a file says of its base, where names alone do not tell."""
    return {"Stable Diffusion 3": "sd3", "Flux.2": "flux2"}.get(name, name)
