"""Flux in diffusers: files of kohya (fused layers), of ai-toolkit and of diffusers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.numpy import save_file

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
    layers,
    split,
)
from tests.consumers.verdicts import judge
from tests.oracle.tiny import truncated, weighted

pytestmark = pytest.mark.consumers
WIDTH = 16
# What kohya calls a layer of a double or a single block, and what diffusers makes of its rows.
DOUBLE = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_mod_lin": ("norm1_context.linear",),
}
SINGLE = {"linear2": ("proj_out",), "modulation_lin": ("norm.linear",)}
FUSED = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}
OUTSIDE = {
    "lora_unet_img_in": ("x_embedder",),
    "lora_unet_time_in_in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "lora_unet_vector_in_out_layer": ("time_text_embed.text_embedder.linear_2",),
    "lora_unet_final_layer_linear": ("proj_out",),
}
NAMES = {
    f"lora_unet_{kind}_blocks_{number}_{name}": tuple(
        f"{blocks}.{number}.{module}" for module in modules
    )
    for kind, blocks, table in (
        ("double", "transformer_blocks", DOUBLE),
        ("single", "single_transformer_blocks", SINGLE),
    )
    for number in range(2)
    for name, modules in table.items()
}


def transformer(
    heads: int = 2, width: int = 8, double: int = 2, single: int = 2
) -> FluxTransformer2DModel:
    """A random transformer; Flux has 24 heads of 128, 19 double and 38 single blocks."""
    torch.manual_seed(3)
    sixteenth = width // 8
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=width,
        num_attention_heads=heads,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(2 * sixteenth, 2 * sixteenth, 4 * sixteenth),
    ).eval()


TRANSFORMER = transformer()


def outputs(model: FluxTransformer2DModel) -> np.ndarray:
    """What six patches become, told four words."""
    draw = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(model.dtype)

    place = torch.arange(6.0)
    ids = torch.stack([0 * place, place // 3, place % 3], dim=1)
    with torch.no_grad():
        found = model(
            hidden_states=normal(1, 6, 4),
            encoder_hidden_states=normal(1, 4, 12),
            pooled_projections=normal(1, 10),
            timestep=torch.tensor([0.5], dtype=model.dtype),
            img_ids=ids,
            txt_ids=torch.zeros(4, 3),
        )
    return found.sample.double().numpy()


def in_pipeline(path: Path, model: FluxTransformer2DModel) -> np.ndarray:
    """Outputs of a pipeline's transformer with an adapter."""
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=model,
    )
    pipe.load_lora_weights(str(path), adapter_name="ours")
    return outputs(pipe.transformer)


def check(what: str, found: np.ndarray, deltas: Deltas) -> None:
    wanted = outputs(added(TRANSFORMER, split(deltas, TRANSFORMER, NAMES)))
    compare("diffusers, Flux", VERSIONS, what, found, wanted, WITHOUT, FLOAT32)


WITHOUT = outputs(added(TRANSFORMER, {}))
LAYERS = layers(TRANSFORMER, NAMES)
A = drawn(LAYERS, lambda n: 4, lambda n: (2.0, 8.0)[n % 2], 1)
B = drawn(LAYERS, lambda n: (2, 3)[n % 2], lambda n: 3.0, 2)
SIGNED = ("-w", "0.7", "-w", "-0.5")
SUM = weighted([dense(A), dense(B)], [0.7, -0.5])
TO = ("--to", "diffusers")
SQUEEZED = {name: truncated(delta, 2) for name, delta in dense(A).items()}
# What is typed -> the delta weights of the result.
FORMS: dict[str, tuple[tuple[str, ...], Deltas]] = {
    "kohya: merge": (("cat", "a", "b", *SIGNED), SUM),
    "kohya: merge, pattern": (("cat", "a", "b", *SIGNED, "--layout", "pattern"), SUM),
    "kohya: squeezed": (("squeeze", "a", "-r", "2"), SQUEEZED),
    "kohya: as trained": (("cat", "a"), dense(A)),
    "diffusers: merge": (("cat", "a", "b", *SIGNED, *TO), SUM),
    "diffusers: merge, pattern": (("cat", "a", "b", *SIGNED, *TO, "--layout", "pattern"), SUM),
    "diffusers: converted": (("convert", "a", *TO), dense(A)),
}


def kohya(path: Path, modules: Modules) -> Path:
    return write_kohya(path, modules, metadata={"ss_base_model_version": "flux1"})


@pytest.mark.parametrize("form", FORMS)
def test_it_loads_every_form(form: str, tmp_path: Path) -> None:
    words, deltas = FORMS[form]
    given = {name: kohya(tmp_path / f"{name}.safetensors", m) for name, m in (("a", A), ("b", B))}
    out = tmp_path / ("out" if "diffusers" in words else "out.safetensors")
    run(*(given.get(word, word) for word in words), "-o", out)
    check(form, in_pipeline(out, transformer()), deltas)


def test_it_splits_the_fused_layer_of_a_single_block(tmp_path: Path) -> None:
    """Which it does at the width of Flux itself, and at no other."""
    model = transformer(heads=24, width=128, double=0, single=1)
    block = "single_transformer_blocks.0"
    name = "lora_unet_single_blocks_0_linear1"
    names = {name: tuple(f"{block}.{part}" for part in FUSED["linear1"])}
    # An update of some size: outputs of a single wide block hardly feel a small one.
    modules = drawn(layers(model, names), lambda n: 4, lambda n: 400.0, 1)
    out = tmp_path / "out.safetensors"
    run("cat", kohya(tmp_path / "a.safetensors", modules), "-o", out)
    wanted = outputs(added(model, split(dense(modules), model, names)))
    without = outputs(added(model, {}))
    found = in_pipeline(out, model)
    what = "kohya: fused linear1"
    compare("diffusers, Flux", VERSIONS, what, found, wanted, without, FLOAT32)


def test_layers_outside_the_blocks_are_loaded_after_conversion(tmp_path: Path) -> None:
    names = {**NAMES, **OUTSIDE}
    modules = drawn(layers(TRANSFORMER, names), lambda n: 2, lambda n: 4.0, 6)
    run("convert", kohya(tmp_path / "a.safetensors", modules), *TO, "-o", tmp_path / "out")
    deltas = split(dense(modules), TRANSFORMER, names)
    wanted = outputs(added(TRANSFORMER, deltas))
    found = in_pipeline(tmp_path / "out", transformer())
    what = "diffusers: layers outside the blocks"
    compare("diffusers, Flux", VERSIONS, what, found, wanted, WITHOUT, FLOAT32)


# What to look out for -> names of layers, and the alpha of each for its rank of 2.
TRAPS: dict[str, tuple[dict[str, tuple[str, ...]], Callable[[int], float | None]]] = {
    "alphas differ": (NAMES, lambda n: (2.0, 8.0)[n % 2]),
    "no alpha": (NAMES, lambda n: None),
    "one alpha": (NAMES, lambda n: 1.0),
    **{f"{name} too": ({**NAMES, name: parts}, lambda n: 2.0) for name, parts in OUTSIDE.items()},
}


@pytest.mark.parametrize("trap", TRAPS)
def test_verify_says_what_it_does_with_a_file_of_kohya(trap: str, tmp_path: Path) -> None:
    names, alpha = TRAPS[trap]
    modules = drawn(layers(TRANSFORMER, names), lambda n: 2, alpha, 7)
    path = kohya(tmp_path / "a.safetensors", modules)
    wanted = outputs(added(TRANSFORMER, split(dense(modules), TRANSFORMER, names)))
    judge("diffusers", path, lambda p: in_pipeline(p, transformer()), wanted, WITHOUT, FLOAT32)


def test_it_loads_what_becomes_of_a_file_of_ai_toolkit(tmp_path: Path) -> None:
    """Keys of diffusers with no alpha at all, and a header about the trainer."""
    modules = drawn(
        {part: TRANSFORMER.get_submodule(part).weight.shape for n in NAMES.values() for part in n},
        lambda n: 4,
        lambda n: None,
        3,
    )
    tensors = {}
    for name, (down, up, _) in modules.items():
        tensors[f"transformer.{name}.lora_A.weight"] = down
        tensors[f"transformer.{name}.lora_B.weight"] = up
    about = {"format": "pt", "software": '{"name": "ai-toolkit"}', "ss_base_model_version": "flux1"}
    save_file(tensors, tmp_path / "a.safetensors", about)
    for what, words in (
        ("squeezed", ("squeeze", "-r", "3")),
        ("scaled", ("scale", "--factor", "-0.5")),
    ):
        out = tmp_path / f"{what}.safetensors"
        run(words[0], tmp_path / "a.safetensors", *words[1:], "-o", out)
        found = in_pipeline(out, transformer())
        deltas = dense(modules)
        if what == "squeezed":
            deltas = {name: truncated(delta, 3) for name, delta in deltas.items()}
        else:
            deltas = weighted([deltas], [-0.5])
        wanted = outputs(added(TRANSFORMER, deltas))
        compare("diffusers, Flux", VERSIONS, f"ai-toolkit: {what}", found, wanted, WITHOUT, FLOAT32)
