"""diffusers as a judge of what we write: every module loaded, with its delta weight."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders import FluxLoraLoaderMixin
from peft.tuners.tuners_utils import BaseTunerLayer

from loramerge.io._names import renamed
from loramerge.io._open import open_adapter
from tests.build import write_kohya
from tests.typed import typed

WIDTH = 16
DOUBLE, SINGLE = "lora_unet_double_blocks_1", "lora_unet_single_blocks_0"
# (out, in, rank) of some layers of a tiny Flux, fused ones and ones under several names' ends.
LAYERS = {
    f"{DOUBLE}_img_attn_qkv": (3 * WIDTH, WIDTH, 4),
    f"{DOUBLE}_txt_attn_proj": (WIDTH, WIDTH, 2),
    f"{DOUBLE}_img_mlp_0": (4 * WIDTH, WIDTH, 1),
    f"{SINGLE}_linear1": (7 * WIDTH, WIDTH, 3),
    f"{SINGLE}_linear2": (WIDTH, 5 * WIDTH, 2),
    "lora_unet_final_layer_linear": (64, WIDTH, 1),
    "lora_unet_final_layer_adaLN_modulation_1": (2 * WIDTH, WIDTH, 2),
}


def flux(path: Path) -> Path:
    draw = np.random.default_rng(4)
    modules = {
        name: (draw.standard_normal((r, n)), draw.standard_normal((m, r)), 2.0)
        for name, (m, n, r) in LAYERS.items()
    }
    return write_kohya(path, modules, metadata={"ss_base_model_version": "flux1"})


@pytest.mark.parametrize("form", ["uniform", "pattern"])
@pytest.mark.parametrize("header", [True, False])
def test_a_flux_adapter_is_loaded_with_the_delta_weights_of_the_kohya_file(
    form: str, header: bool, tmp_path: Path
) -> None:
    file = flux(tmp_path / "a.safetensors")
    words = ["--energy", "1", "--to", "diffusers", "--layout", form]
    done = typed("squeeze", file, *words, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    state, metadata = FluxLoraLoaderMixin.lora_state_dict(
        str(tmp_path / "out"), return_lora_metadata=True
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
    wanted = renamed(open_adapter(str(file)), "diffusers")
    layers = dict(model.named_modules())
    loaded = {name for name, layer in layers.items() if isinstance(layer, BaseTunerLayer)}
    assert {f"transformer.{name}" for name in loaded} >= set(wanted.modules)
    for name in loaded:
        delta = layers[name].get_delta_weight("ours").detach()
        if (full := f"transformer.{name}") in wanted.modules:
            update = wanted.read(full)
            expected = torch.from_numpy(update.B @ update.A)
            # Two roundings of the factors to float32, and a float32 product.
            torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-5)
        else:
            assert not delta.any()
