"""Stable Diffusion in diffusers: UNet and text encoder, with files of kohya and of diffusers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.numpy import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from tests.build import write_kohya
from tests.consumers.deviations import compare
from tests.consumers.forms import run
from tests.consumers.pipelines import (
    FLOAT32,
    VERSIONS,
    Deltas,
    Modules,
    added,
    dense,
    drawn,
    shapes,
)
from tests.consumers.verdicts import judge
from tests.oracle.tiny import truncated, weighted

pytestmark = pytest.mark.consumers
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.2", "net.0.proj")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut")
CLIP = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
ABOUT = {"ss_base_model_version": "sd_v1"}
WEIGHTS = [0.7, -0.5]
SIGNED = ("-w", "0.7", "-w", "-0.5")


def pipeline() -> StableDiffusionPipeline:
    """All of it tiny and random."""
    torch.manual_seed(7)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=37,
            num_attention_heads=4,
            num_hidden_layers=2,
            bos_token_id=0,
            eos_token_id=2,
        )
    )
    return StableDiffusionPipeline(
        unet=unet,
        text_encoder=text,
        vae=AutoencoderKL(norm_num_groups=8, block_out_channels=(8,)),
        tokenizer=None,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def outputs(unet: nn.Module, text: nn.Module) -> dict[str, np.ndarray]:
    """What a noisy picture and a few words become; each sees the same whatever the other is."""
    draw = torch.Generator().manual_seed(1)
    dtype = next(unet.parameters()).dtype
    noise = torch.randn(1, 4, 8, 8, generator=draw).to(dtype)
    hint = torch.randn(1, 5, 32, generator=draw).to(dtype)
    with torch.no_grad():
        words = text.eval()(torch.tensor([[0, 17, 5, 61, 2]])).last_hidden_state
        picture = unet.eval()(noise, 10, hint).sample
    return {"UNet": picture.double().numpy(), "text encoder": words.double().numpy()}


PIPELINE = pipeline()
UNET = shapes(PIPELINE.unet, (nn.Linear, nn.Conv2d), ATTENTION + CONVOLUTIONS)
TEXT = shapes(PIPELINE.text_encoder, (nn.Linear,), CLIP)
# Before version 5 transformers had one more word in front, which kohya kept.
LAYERS = {
    **{f"lora_unet_{name}".replace(".", "_"): shape for name, shape in UNET.items()},
    **{f"lora_te_text_model_{name}".replace(".", "_"): shape for name, shape in TEXT.items()},
}
NAMES = dict(zip(LAYERS, [*UNET, *TEXT], strict=True))


def expected(deltas: Deltas) -> dict[str, np.ndarray]:
    """The outputs with delta weights by kohya's names, in float64."""
    unet = {NAMES[name]: x for name, x in deltas.items() if name.startswith("lora_unet")}
    text = {NAMES[name]: x for name, x in deltas.items() if name.startswith("lora_te")}
    return outputs(added(PIPELINE.unet, unet), added(PIPELINE.text_encoder, text))


WITHOUT = expected({})


def loaded(path: Path) -> StableDiffusionPipeline:
    """A new pipeline with an adapter."""
    pipe = pipeline()
    pipe.load_lora_weights(str(path), adapter_name="ours")
    return pipe


def check(
    what: str,
    pipe: StableDiffusionPipeline,
    deltas: Deltas,
    parts: tuple[str, ...] = ("UNet", "text encoder"),
) -> None:
    found, wanted = outputs(pipe.unet, pipe.text_encoder), expected(deltas)
    for part in parts:
        name = f"diffusers, SD {part}"
        compare(name, VERSIONS, what, found[part], wanted[part], WITHOUT[part], FLOAT32)


ODD = (4, 2, 3)
A = drawn(LAYERS, lambda n: ODD[n % 3], lambda n: 2.0, 1)
B = drawn(LAYERS, lambda n: 3, lambda n: (1.0, 4.0)[n % 2], 2)
SUM = weighted([dense(A), dense(B)], WEIGHTS)


class Form(NamedTuple):
    """What is typed, and the delta weights of the result."""

    words: tuple[str, ...]
    deltas: Deltas
    rank: int | None = None


TO = ("--to", "diffusers")
FORMS = {
    "kohya: merge": Form(("cat", "a", "b", *SIGNED), SUM),
    "kohya: merge, pattern": Form(("cat", "a", "b", *SIGNED, "--layout", "pattern"), SUM),
    "kohya: merge cut to rank 3": Form(("arithmetic", "a", "b", *SIGNED, "-r", "3"), SUM, 3),
    "kohya: squeezed": Form(("squeeze", "b", "-r", "2"), dense(B), 2),
    "diffusers: merge": Form(("cat", "a", "b", *SIGNED, *TO), SUM),
    "diffusers: merge, pattern": Form(("cat", "a", "b", *SIGNED, *TO, "--layout", "pattern"), SUM),
    "diffusers: squeezed": Form(("squeeze", "b", "-r", "2", *TO), dense(B), 2),
    "diffusers: converted": Form(("convert", "b", *TO), dense(B)),
}


@pytest.mark.parametrize("form", FORMS)
def test_it_loads_every_form(form: str, tmp_path: Path) -> None:
    one = FORMS[form]
    check(form, loaded(made(one, tmp_path)), wanted(one))


def made(one: Form, directory: Path) -> Path:
    """A form on disk."""
    given = {
        name: write_kohya(directory / f"{name}.safetensors", modules, metadata=ABOUT)
        for name, modules in (("a", A), ("b", B))
    }
    out = directory / ("out" if "diffusers" in one.words else "out.safetensors")
    run(*(given.get(word, word) for word in one.words), "-o", out)
    return out


def wanted(one: Form) -> Deltas:
    if one.rank is None:
        return one.deltas
    return {name: truncated(delta, one.rank) for name, delta in one.deltas.items()}


def test_half_of_it_is_half_the_delta_weights(tmp_path: Path) -> None:
    pipe = loaded(made(FORMS["kohya: merge"], tmp_path))
    pipe.set_adapters(["ours"], [0.5])
    check("kohya: merge, set_adapters 0.5", pipe, weighted([SUM], [0.5]))


def test_one_form_is_swapped_in_for_another(tmp_path: Path) -> None:
    """In the UNet alone: diffusers swaps no adapters of text encoders."""
    pipe = pipeline()
    pipe.enable_lora_hotswap(target_rank=8)
    for form in ("diffusers: merge", "diffusers: squeezed"):
        whole = made(FORMS[form], tmp_path / form)
        path = tmp_path / form / "unet"
        run("select", whole, "--include", "unet.*", "-o", path)
        pipe.load_lora_weights(str(path), adapter_name="ours", hotswap="squeezed" in form)
    check("diffusers: hotswap", pipe, wanted(FORMS[form]), parts=("UNet",))


def kohya(rank: Callable[[int], int], alpha: Callable[[int], float | None]) -> Modules:
    return drawn(LAYERS, rank, alpha, 5)


TRAPS = {
    "one alpha": kohya(lambda n: 4, lambda n: 2.0),
    "one alpha, ranks differ": kohya(lambda n: ODD[n % 3], lambda n: 2.0),
    "alpha is the rank": kohya(lambda n: ODD[n % 3], lambda n: ODD[n % 3]),
    "no alpha": kohya(lambda n: ODD[n % 3], lambda n: None),
    "alphas differ": kohya(lambda n: 4, lambda n: (1.0, 2.0)[n % 2]),
    "one alpha is missing": kohya(lambda n: 4, lambda n: None if n == 5 else 2.0),
    "alphas of UNet and text encoder differ": kohya(lambda n: 4, lambda n: 2.0 + (n >= len(UNET))),
    "alpha zero": kohya(lambda n: 4, lambda n: 0.0),
}


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")
def test_verify_says_what_it_does_with_a_file_of_kohya(trap: str, tmp_path: Path) -> None:
    modules = TRAPS[trap]
    path = write_kohya(tmp_path / "a.safetensors", modules, metadata=ABOUT)
    full = expected(dense(modules))

    def joined(parts: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([x.ravel() for x in parts.values()])

    def load(path: Path) -> np.ndarray:
        pipe = loaded(path)
        return joined(outputs(pipe.unet, pipe.text_encoder))

    judge("diffusers", path, load, joined(full), joined(WITHOUT), FLOAT32)


def test_verify_says_that_it_leaves_out_magnitudes(tmp_path: Path) -> None:
    """DoRA by LyCORIS: rows of weight plus update, made as long as dora_scale says."""
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    modules = {name: A[name]}
    weight = PIPELINE.unet.get_submodule(NAMES[name]).weight.detach().double().numpy()
    lengths = np.random.default_rng(8).uniform(1, 3, (len(weight), 1)).astype("f4")
    path = write_kohya(tmp_path / "a.safetensors", modules, metadata=ABOUT)
    save_file({**load_file(path), f"{name}.dora_scale": lengths}, path)
    summed = weight + dense(modules)[name]
    turned = lengths / np.linalg.norm(summed, axis=1, keepdims=True) * summed - weight
    wanted = expected({name: turned})["UNet"]

    def load(path: Path) -> np.ndarray:
        pipe = loaded(path)
        return outputs(pipe.unet, pipe.text_encoder)["UNet"]

    judge("diffusers", path, load, wanted, WITHOUT["UNet"], FLOAT32)
