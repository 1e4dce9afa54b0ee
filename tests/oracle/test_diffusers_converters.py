"""diffusers' converters of LoRA files as a judge: the same modules, and the same delta weights."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.loaders import lora_conversion_utils as utils
from diffusers.loaders import lora_pipeline
from safetensors.torch import load_file, save_file

from loramerge.adapter import Adapter
from loramerge.io._names import families, renamed
from loramerge.io._names._table import Row
from loramerge.io._open import open_adapter

FAMILIES = {family.name: family for family in families()}
RANK = 2
# The converters of Flux and HunyuanVideo know but one width.
FLUX = 3072
Tensors = dict[str, torch.Tensor]


@dataclass
class Case:
    """A file of a family in one vocabulary, and what of diffusers reads it."""

    family: str
    naming: str
    convert: Callable[[Tensors], Tensors]
    ends: tuple[str, str] = ("lora_down", "lora_up")
    alpha: float | None = 1.0
    width: int = 4
    leave_out: tuple[str, ...] = ()


def pipeline(name: str, **options: object) -> Callable[[Tensors], Tensors]:
    """The classmethod that reads files for a pipeline, and decides itself what they are."""
    mixin = getattr(lora_pipeline, f"{name}LoraLoaderMixin")
    return lambda tensors: mixin.lora_state_dict(tensors, **options)


class Unet:
    """What diffusers asks of a UNet to number its blocks."""

    layers_per_block = 2


def stable_diffusion(tensors: Tensors) -> Tensors:
    """Its alphas, all of which are the rank here, come beside."""
    state, alphas = lora_pipeline.StableDiffusionXLLoraLoaderMixin.lora_state_dict(
        tensors, unet_config=Unet()
    )
    assert set(alphas.values()) <= {RANK}
    return state


AB = ("lora_A", "lora_B")
# Layers outside the blocks that a converter does not know, or gives no `transformer.`.
ENDS = ("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer")
WAN = ("patch_embedding", "vace_blocks")
WAN_ENDS = (*WAN, "head_head", "head.head", "img_emb", "text_embedding", "time_")
# Of final_layer.adaLN_modulation, Flux.2's forgets to turn shift and scale around, which its
# converter of checkpoints does, and HunyuanVideo's turns the rows of A around as well.
TURNED = "adaLN"
CASES = {
    "kohya-sd1": Case(
        "Stable Diffusion 1 or 2",
        "kohya",
        stable_diffusion,
        alpha=RANK,
        leave_out=("embeddings", "add_embedding"),
    ),
    "kohya-sdxl": Case(
        "Stable Diffusion XL", "kohya", stable_diffusion, alpha=RANK, leave_out=("embeddings",)
    ),
    "kohya-flux": Case(
        "Flux",
        "kohya",
        pipeline("Flux"),
        width=FLUX,
        leave_out=(*ENDS, "lora_te3", "embeddings", "text_projection"),
    ),
    "xlabs-flux": Case("Flux", "xlabs", pipeline("Flux"), ("down", "up"), None, FLUX),
    "kohya-flux2": Case(
        "Flux.2",
        "kohya",
        utils._convert_kohya_flux2_lora_to_diffusers,
        leave_out=("modulation", "guidance_in"),
    ),
    "comfy-flux2": Case("Flux.2", "comfy", pipeline("Flux2"), AB, None, leave_out=(TURNED,)),
    "comfy-wan": Case("Wan", "comfy", pipeline("Wan"), leave_out=WAN_ENDS),
    "comfy-wan-plain": Case("Wan", "comfy", pipeline("Wan"), AB, None, leave_out=WAN),
    "musubi-wan": Case("Wan", "kohya", pipeline("Wan"), leave_out=WAN_ENDS),
    "comfy-hunyuan": Case(
        "HunyuanVideo",
        "comfy",
        pipeline("HunyuanVideo"),
        AB,
        None,
        FLUX,
        leave_out=("txt_in", TURNED),
    ),
    "kohya-qwen": Case("Qwen-Image", "kohya", pipeline("QwenImage")),
    "comfy-qwen": Case("Qwen-Image", "comfy", pipeline("QwenImage"), AB, None),
    "musubi-z-image": Case("Z-Image", "kohya", pipeline("ZImage")),
}


def names(case: Case) -> Iterator[tuple[str, Row]]:
    """Every layer of the family, in the vocabulary of the case."""
    for component in FAMILIES[case.family].components:
        for spelling in component.spellings.get(case.naming, ())[:1]:
            for row in spelling.rows:
                name = spelling.written(row).replace("{}", "0")
                if not any(part in name for part in case.leave_out):
                    yield name, row


def file_of(case: Case, path: Path) -> Path:
    """An adapter of every layer, with normal factors."""
    draw = torch.Generator().manual_seed(11)
    tensors: Tensors = {}
    for name, row in names(case):
        rows = sum(row.shares) * case.width if row.shares else 2 * case.width
        for end, shape in zip(case.ends, ((RANK, case.width), (rows, RANK)), strict=True):
            tensors[f"{name}.{end}.weight"] = torch.randn(shape, generator=draw)
        if case.alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(float(case.alpha))
    save_file(tensors, path, {"modelspec.architecture": case.family})
    return path


def applied(adapter: Adapter, name: str) -> np.ndarray:
    """The update of a few random inputs: equal where delta weights are, and much smaller."""
    update = adapter.read(name, wide=True)
    inputs = np.random.default_rng(2).standard_normal((update.A.shape[1], 4))
    return update.B @ (update.A @ inputs)


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_translated_as_diffusers_converts_it(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    file = file_of(case, tmp_path / "a.safetensors")
    converted = {key: tensor.clone() for key, tensor in case.convert(load_file(file)).items()}
    save_file(converted, tmp_path / "theirs.safetensors")
    ours = renamed(open_adapter(str(file)), "diffusers")
    theirs = open_adapter(str(tmp_path / "theirs.safetensors"))
    assert theirs.layout == "diffusers"
    assert set(ours.modules) == set(theirs.modules)
    for module in ours.modules:
        expected = applied(theirs, module)
        gap = np.linalg.norm(applied(ours, module) - expected)
        # Both multiply a factor by alpha / rank in float32, each another one.
        assert gap <= 1e-6 * np.linalg.norm(expected), module


def test_split_qkv_is_cut_along_its_blocks_as_in_diffusers(tmp_path: Path) -> None:
    """q, k and v of rank 2 in one of rank 6, zero off the diagonal, as sd-scripts saves them."""
    draw = torch.Generator().manual_seed(3)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    ups = torch.block_diag(*(torch.randn(FLUX, RANK, generator=draw) for _ in range(3)))
    tensors = {
        f"{name}.lora_down.weight": torch.randn(3 * RANK, FLUX, generator=draw),
        f"{name}.lora_up.weight": ups,
        f"{name}.alpha": torch.tensor(3.0 * RANK),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    ours = renamed(open_adapter(str(tmp_path / "a.safetensors")), "diffusers")
    theirs = pipeline("Flux")(tensors)
    for module in ours.modules:
        update = ours.read(module)
        np.testing.assert_array_equal(update.A, theirs[f"{module}.lora_A.weight"].numpy())
        np.testing.assert_array_equal(update.B, theirs[f"{module}.lora_B.weight"].numpy())
    assert len(theirs) == 2 * len(ours.modules) == 6
