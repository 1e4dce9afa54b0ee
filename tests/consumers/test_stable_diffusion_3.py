"""Stable Diffusion 3 in diffusers, which reads no files of kohya: converted ones it does."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from tests.build import write_kohya
from tests.consumers.deviations import compare
from tests.consumers.forms import run
from tests.consumers.pipelines import FLOAT32, VERSIONS, added, dense, drawn, layers, split
from tests.consumers.verdicts import judge

pytestmark = pytest.mark.consumers
# What kohya calls a layer of a joint block, and what diffusers makes of its rows.
JOINT = {
    "x_block_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block_attn_proj": ("attn.to_out.0",),
    "x_block_mlp_fc1": ("ff.net.0.proj",),
    "x_block_mlp_fc2": ("ff.net.2",),
    "x_block_adaLN_modulation_1": ("norm1.linear",),
}
NAMES = {
    f"lora_unet_joint_blocks_{number}_{name}": tuple(
        f"transformer_blocks.{number}.{module}" for module in modules
    )
    for number in range(2)
    for name, modules in JOINT.items()
}


def transformer() -> SD3Transformer2DModel:
    torch.manual_seed(9)
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
    ).eval()


TRANSFORMER = transformer()


def outputs(model: SD3Transformer2DModel) -> np.ndarray:
    """What a noisy picture becomes, told four words."""
    draw = torch.Generator().manual_seed(1)
    # Its table of positions is float64, and cast to float16 in between: the same for all.
    noise, words, pooled = (
        torch.randn(*shape, generator=draw).to(model.dtype)
        for shape in ((1, 4, 8, 8), (1, 4, 12), (1, 10))
    )
    with torch.no_grad():
        found = model(noise, words, pooled, torch.tensor([500.0], dtype=model.dtype))
    return found.sample.double().numpy()


def in_pipeline(path: Path) -> np.ndarray:
    """Outputs of a pipeline's transformer with an adapter."""
    parts = ("vae", "text_encoder", "tokenizer")
    absent = dict.fromkeys((*parts, *(f"{p}_{n}" for p in parts[1:] for n in (2, 3))))
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = StableDiffusion3Pipeline(transformer=transformer(), scheduler=scheduler, **absent)
    pipe.load_lora_weights(str(path), adapter_name="ours")
    return outputs(pipe.transformer)


WITHOUT = outputs(added(TRANSFORMER, {}))
MODULES = drawn(layers(TRANSFORMER, NAMES), lambda n: (2, 3)[n % 2], lambda n: 4.0, 1)
WANTED = outputs(added(TRANSFORMER, split(dense(MODULES), TRANSFORMER, NAMES)))


def kohya(directory: Path) -> Path:
    facts = {"ss_base_model_version": "sd3m"}
    return write_kohya(directory / "a.safetensors", MODULES, metadata=facts)


def test_it_loads_a_converted_file(tmp_path: Path) -> None:
    run("convert", kohya(tmp_path), "--to", "diffusers", "-o", tmp_path / "out")
    found = in_pipeline(tmp_path / "out")
    what = "diffusers: converted"
    compare("diffusers, SD3", VERSIONS, what, found, WANTED, WITHOUT, FLOAT32)


def test_verify_says_that_it_loads_nothing_of_a_file_of_kohya(tmp_path: Path) -> None:
    judge("diffusers", kohya(tmp_path), in_pipeline, WANTED, WITHOUT, FLOAT32)
