"""Text encoders of Flux and of Stable Diffusion XL in diffusers, with files of kohya."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.lora_base import LoraBaseMixin
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.build import write_kohya
from tests.consumers.deviations import compare
from tests.consumers.forms import run
from tests.consumers.pipelines import (
    FLOAT32,
    VERSIONS,
    Modules,
    added,
    dense,
    drawn,
    shapes,
)
from tests.consumers.test_flux import transformer
from tests.consumers.verdicts import judge

pytestmark = pytest.mark.consumers
LEAVES = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
FIRST = (lambda n: 2, lambda n: 2.0, 0)
WORDS = torch.tensor([[0, 17, 5, 61, 2]])


def clip(kind: type[nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        bos_token_id=0,
        eos_token_id=2,
    )
    return kind(config).eval()


def flux() -> LoraBaseMixin:
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=clip(CLIPTextModel, 1),
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer(),
    )


def xl() -> LoraBaseMixin:
    return StableDiffusionXLPipeline(
        vae=None,
        text_encoder=clip(CLIPTextModel, 1),
        text_encoder_2=clip(CLIPTextModelWithProjection, 2),
        tokenizer=None,
        tokenizer_2=None,
        unet=UNet2DConditionModel(block_out_channels=(8, 8), norm_num_groups=8, **SMALL),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


SMALL = {
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "mid_block_type": None,
}
# Pipeline -> how it is made, what its header says, and kohya's words for its text encoders.
PIPELINES: dict[str, tuple[Callable[[], LoraBaseMixin], str, dict[str, str]]] = {
    "Flux": (flux, "flux1", {"lora_te1": "text_encoder"}),
    "SDXL": (xl, "sdxl_base_v1-0", {"lora_te1": "text_encoder", "lora_te2": "text_encoder_2"}),
}


def outputs(encoders: list[nn.Module]) -> np.ndarray:
    """What a few words become in each encoder."""
    with torch.no_grad():
        found = [encoder.eval()(WORDS).last_hidden_state.flatten() for encoder in encoders]
    return torch.cat(found).double().numpy()


def modules_of(name: str, alpha: Callable[[int], float]) -> dict[str, tuple[str, Modules]]:
    """Encoder -> kohya's word for it, and random factors of its layers."""
    make, _, words = PIPELINES[name]
    pipe = make()
    return {
        encoder: (
            word,
            drawn(
                shapes(getattr(pipe, encoder), (nn.Linear,), LEAVES),
                lambda n: (2, 3)[n % 2],
                lambda n, place=place: alpha(n + 100 * place),
                place,
            ),
        )
        for place, (word, encoder) in enumerate(words.items())
    }


def written(name: str, parts: dict[str, tuple[str, Modules]], directory: Path) -> Path:
    """A file of kohya's, which keeps a word that transformers has dropped here and there.

    One with a layer of Flux in it too: text encoders alone do not say what they belong to.
    """
    modules = {
        f"{word}_text_model_{layer.removeprefix('text_model.')}".replace(".", "_"): factors
        for word, drawn_ in parts.values()
        for layer, factors in drawn_.items()
    }
    if name == "Flux":
        modules |= drawn({"lora_unet_double_blocks_0_img_attn_proj": (16, 16)}, *FIRST)
    facts = {"ss_base_model_version": PIPELINES[name][1]}
    return write_kohya(directory / "a.safetensors", modules, metadata=facts)


def expected(name: str, parts: dict[str, tuple[str, Modules]]) -> tuple[np.ndarray, np.ndarray]:
    """Outputs with the adapter, and without, in float64."""
    pipe = PIPELINES[name][0]()
    plain = [added(getattr(pipe, encoder), {}) for encoder in parts]
    adapted = [added(getattr(pipe, e), dense(modules)) for e, (_, modules) in parts.items()]
    return outputs(adapted), outputs(plain)


def load(name: str, path: Path) -> np.ndarray:
    make, _, words = PIPELINES[name]
    pipe = make()
    pipe.load_lora_weights(str(path), adapter_name="ours")
    return outputs([getattr(pipe, encoder) for encoder in words.values()])


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_it_loads_a_merge(name: str, to: str, tmp_path: Path) -> None:
    parts = modules_of(name, lambda n: (1.0, 4.0)[n % 2])
    out = tmp_path / ("out.safetensors" if to == "kohya" else "out")
    run("cat", written(name, parts, tmp_path), "--to", to, "-o", out)
    wanted, without = expected(name, parts)
    program = f"diffusers, {name} text encoders"
    compare(program, VERSIONS, f"{to}: merge", load(name, out), wanted, without, FLOAT32)


# One alpha for each encoder, and several within one.
@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("alpha", [lambda n: 1.0 + n // 100, lambda n: (1.0, 4.0)[n % 2]])
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")
def test_verify_says_what_it_does_with_alphas(
    name: str, alpha: Callable[[int], float], tmp_path: Path
) -> None:
    parts = modules_of(name, alpha)
    wanted, without = expected(name, parts)
    path = written(name, parts, tmp_path)
    judge("diffusers", path, lambda p: load(name, p), wanted, without, FLOAT32)
