"""The models of diffusers and transformers as a judge of our tables: no layer without a name."""

import re
from collections.abc import Iterable

import pytest
import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from loramerge.io._names import families

FAMILIES = {family.name: family for family in families()}
HEADS = {"attention_head_dim": 8, "num_attention_heads": 2}
SMALL = {"num_layers": 2, **HEADS}
JOINT = {"joint_attention_dim": 16, "pooled_projection_dim": 16}
LEVELS = {"block_out_channels": (32, 32, 32), "norm_num_groups": 8, "cross_attention_dim": 8}
DOWN, UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
XL = {
    "down_block_types": ("DownBlock2D", DOWN, DOWN),
    "up_block_types": (UP, UP, "UpBlock2D"),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
    "use_linear_projection": True,
}
CLIP = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
T5 = {"num_layers": 1, "d_model": 8, "d_ff": 16, "num_heads": 2, "d_kv": 4}
GATED = {**T5, "feed_forward_proj": "gated-gelu"}
MODELS = {
    ("Flux", "transformer"): lambda: FluxTransformer2DModel(
        **SMALL, **JOINT, num_single_layers=2, axes_dims_rope=(2, 2, 4), guidance_embeds=True
    ),
    ("Flux.2", "transformer"): lambda: Flux2Transformer2DModel(
        **SMALL, num_single_layers=2, joint_attention_dim=16, axes_dims_rope=(2, 2, 2, 2)
    ),
    ("HunyuanVideo", "transformer"): lambda: HunyuanVideoTransformer3DModel(
        **SMALL, num_single_layers=2, num_refiner_layers=2, rope_axes_dim=(2, 2, 4)
    ),
    ("Qwen-Image", "transformer"): lambda: QwenImageTransformer2DModel(
        **SMALL, joint_attention_dim=16, axes_dims_rope=(2, 2, 4)
    ),
    ("Stable Diffusion 3", "transformer"): lambda: SD3Transformer2DModel(
        **SMALL, **JOINT, caption_projection_dim=16, sample_size=8, dual_attention_layers=(0,)
    ),
    ("Stable Diffusion 1 or 2", "unet"): lambda: UNet2DConditionModel(
        block_out_channels=(32,) * 4, norm_num_groups=8, cross_attention_dim=8
    ),
    ("Stable Diffusion XL", "unet"): lambda: UNet2DConditionModel(**LEVELS, **XL),
    ("Wan", "transformer"): lambda: WanTransformer3DModel(
        num_layers=2, attention_head_dim=12, num_attention_heads=2, image_dim=8, added_kv_proj_dim=8
    ),
    ("Z-Image", "transformer"): lambda: ZImageTransformer2DModel(
        dim=16, n_layers=2, n_refiner_layers=2, n_heads=2, n_kv_heads=2, axes_dims=[2, 2, 4]
    ),
    ("Stable Diffusion XL", "text_encoder_2"): lambda: CLIPTextModelWithProjection(
        CLIPTextConfig(**CLIP)
    ),
    ("Flux", "text_encoder_2"): lambda: T5EncoderModel(T5Config(**GATED)),
}
# Their tables of vectors are looked up, and tied to each other or never adapted.
LOOKED_UP = re.compile(r"shared|encoder\.embed_tokens|.*relative_attention_bias")
# What the models above lack: VACE's blocks, T5's MLP without a gate, the labels of XL, and a
# shortcut where the number of channels stays.
OTHERS = re.compile(r"vace_blocks\..*|.*DenseReluDense\.wi|add_embedding\..*|.*\.conv_shortcut")
LAYERS = (nn.Linear, nn.Conv2d, nn.Conv3d, nn.Embedding)


def open_numbers(names: Iterable[str], known: Iterable[str]) -> set[str]:
    """Names with the numbers open that are so in the table."""
    patterns = {name: re.compile(re.escape(name).replace(r"\{\}", r"\d+")) for name in known}
    return {
        next((pattern for pattern, regex in patterns.items() if regex.fullmatch(name)), name)
        for name in names
    }


@pytest.mark.parametrize(("family", "component"), MODELS)
def test_every_layer_of_the_model_has_a_name_and_every_name_is_a_layer(
    family: str, component: str
) -> None:
    with torch.device("meta"):
        model = MODELS[family, component]()
    layers = [name for name, layer in model.named_modules() if isinstance(layer, LAYERS)]
    (ours,) = (c for c in FAMILIES[family].components if c.name == component)
    known = {row.name for row in ours.spellings["diffusers"][0].rows}
    found = {name for name in layers if not LOOKED_UP.fullmatch(name)}
    named = open_numbers(found, known)
    assert named - known == set()
    assert {name for name in known - named if not OTHERS.fullmatch(name)} == set()
