"""diffusers as a judge of what we write: every module loaded, with its delta weight."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from diffusers.loaders import FluxLoraLoaderMixin, StableDiffusionLoraLoaderMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from loramerge.adapter import Adapter
from loramerge.io._names import renamed
from loramerge.io._open import open_adapter
from tests.build import write_kohya
from tests.typed import typed

WIDTH = 16
DOUBLE, SINGLE = "lora_unet_double_blocks_1", "lora_unet_single_blocks_0"
MIDDLE = "lora_unet_mid_block_attentions_0_transformer_blocks_0"
TEXT = "lora_te_text_model_encoder_layers_1"
# (out, in, ...) and rank of some layers of a tiny Flux, fused ones and such as end alike.
FLUX = {
    f"{DOUBLE}_img_attn_qkv": ((3 * WIDTH, WIDTH), 4),
    f"{DOUBLE}_txt_attn_proj": ((WIDTH, WIDTH), 2),
    f"{DOUBLE}_img_mlp_0": ((4 * WIDTH, WIDTH), 1),
    f"{SINGLE}_linear1": ((7 * WIDTH, WIDTH), 3),
    f"{SINGLE}_linear2": ((WIDTH, 5 * WIDTH), 2),
    "lora_unet_final_layer_linear": ((64, WIDTH), 1),
    "lora_unet_final_layer_adaLN_modulation_1": ((2 * WIDTH, WIDTH), 2),
}
STABLE = {
    f"{MIDDLE}_attn1_to_q": ((32, 32), 2),
    f"{MIDDLE}_ff_net_0_proj": ((256, 32), 3),
    "lora_unet_mid_block_attentions_0_proj_in": ((32, 32, 1, 1), 1),
    "lora_unet_down_blocks_0_resnets_0_conv1": ((32, 32, 3, 3), 2),
    f"{TEXT}_self_attn_q_proj": ((8, 8), 2),
    f"{TEXT}_mlp_fc1": ((16, 8), 1),
}
every_form = pytest.mark.parametrize("form", ["uniform", "pattern"])
# Versions of diffusers before 0.35 read no header.
with_or_without = pytest.mark.parametrize("header", [True, False])


def kohya(path: Path, layers: dict[str, tuple[tuple[int, ...], int]], base: str) -> Path:
    draw = np.random.default_rng(4)
    modules = {
        name: (
            draw.standard_normal((rank, *shape)),
            draw.standard_normal((out, rank, *(1 for _ in shape[1:]))),
            2.0,
        )
        for name, ((out, *shape), rank) in layers.items()
    }
    return write_kohya(path, modules, metadata={"ss_base_model_version": base})


def written(file: Path, form: str, out: Path) -> str:
    """The adapter as a directory for diffusers, at every rank it has."""
    words = ["--energy", "1", "--to", "diffusers", "--layout", form]
    done = typed("squeeze", file, *words, "-o", out)
    assert done.code == 0, done.err
    return str(out)


def assert_loaded(model: nn.Module, component: str, wanted: Adapter) -> None:
    """Every module of a component has its update, and no other layer has any."""
    layers = dict(model.named_modules())
    loaded = {name for name, layer in layers.items() if isinstance(layer, BaseTunerLayer)}
    names = {
        name.partition(".")[2].removeprefix("text_model."): name
        for name in wanted.modules
        if name.startswith(f"{component}.")
    }
    assert loaded >= set(names)
    for name in loaded:
        delta = layers[name].get_delta_weight("ours").detach()
        if name not in names:
            assert not delta.any()
            continue
        update = wanted.read(names[name])
        expected = torch.from_numpy(update.B @ update.A)
        # Two roundings of the factors to float32, and a float32 product.
        torch.testing.assert_close(delta.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)


@every_form
@with_or_without
def test_a_flux_adapter_is_loaded_with_the_delta_weights_of_the_kohya_file(
    form: str, header: bool, tmp_path: Path
) -> None:
    file = kohya(tmp_path / "a.safetensors", FLUX, "flux1")
    state, metadata = FluxLoraLoaderMixin.lora_state_dict(
        written(file, form, tmp_path / "out"), return_lora_metadata=True
    )
    model = FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    FluxLoraLoaderMixin.load_lora_into_transformer(
        state, None, model, adapter_name="ours", metadata=metadata if header else None
    )
    assert_loaded(model, "transformer", renamed(open_adapter(str(file)), "diffusers"))


@every_form
@with_or_without
def test_a_stable_diffusion_adapter_is_loaded_into_unet_and_text_encoder(
    form: str, header: bool, tmp_path: Path
) -> None:
    file = kohya(tmp_path / "a.safetensors", STABLE, "sd_v1")
    state, _, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
        written(file, form, tmp_path / "out"), return_lora_metadata=True
    )
    facts: dict[str, Any] = {"adapter_name": "ours", "metadata": metadata if header else None}
    unet = UNet2DConditionModel(
        block_out_channels=(32,) * 4, norm_num_groups=8, cross_attention_dim=8
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            num_hidden_layers=2, hidden_size=8, intermediate_size=16, num_attention_heads=2
        )
    )
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, None, unet, **facts)
    StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(state, None, text, **facts)
    wanted = renamed(open_adapter(str(file)), "diffusers")
    assert_loaded(unet, "unet", wanted)
    assert_loaded(text, "text_encoder", wanted)
