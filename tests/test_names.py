"""Names of layers between vocabularies: every row of every table, there and back."""

import re
from collections.abc import Iterator

import numpy as np
import pytest

from loramerge.errors import IncompatibleError
from loramerge.io._names import families, renamed
from loramerge.io._names._table import Component, Family, Spelling
from loramerge.io._open import open_adapter
from tests.build import save, write_kohya, write_peft

FAMILIES = {family.name: family for family in families()}
SPELT = [
    (family, naming, component, spelling, first)
    for family in families()
    for component in family.components
    for naming, spellings in component.spellings.items()
    for first, spelling in zip([True] + [False] * len(spellings), spellings, strict=False)
]
every_spelling = pytest.mark.parametrize(
    ("family", "naming", "component", "spelling", "first"),
    SPELT,
    ids=[f"{f.name}-{n}-{c.name}-{s.prefix}{len(s.rows)}" for f, n, c, s, _ in SPELT],
)


def numbered(name: str, numbers: Iterator[int]) -> str:
    return re.sub(r"\{\}", lambda _: str(next(numbers)), name)


@every_spelling
def test_a_name_means_its_row_and_the_parts_spell_it_again(
    family: Family, naming: str, component: Component, spelling: Spelling, first: bool
) -> None:
    for row in spelling.rows:
        name = numbered(spelling.written(row), iter((3, 11)))
        parts = tuple(f"{component.name}.{numbered(p, iter((3, 11)))}" for p in row.parts)
        found = family.parse(naming, name)
        assert found is not None
        assert found.parts == parts
        for place, part in enumerate(parts):
            spelt = family.spell(naming, part)
            if first:
                assert spelt is not None
                assert (spelt.name, spelt.place, spelt.whole) == (name, place, found)


@pytest.mark.parametrize("naming", ["comfy", "diffusers", "kohya", "model", "onetrainer"])
@pytest.mark.parametrize("family", families(), ids=list(FAMILIES))
def test_no_two_layers_have_one_name(family: Family, naming: str) -> None:
    meanings: dict[str, set[tuple[str, ...]]] = {}
    for component in family.components:
        for spelling in component.spellings.get(naming, ()):
            for row in spelling.rows:
                meanings.setdefault(spelling.written(row), set()).add((component.name, *row.parts))
    assert {name: found for name, found in meanings.items() if len(found) > 1} == {}


def pair(rows: int, columns: int, rank: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng([rows, columns, seed])
    return (
        draw.standard_normal((rank, columns)).astype(np.float32),
        draw.standard_normal((rows, rank)).astype(np.float32),
    )


def kohya(tmp_path, *names: str, rows: int = 6, columns: int = 6):
    path = tmp_path / "kohya.safetensors"
    return open_adapter(
        str(write_kohya(path, {name: (*pair(rows, columns), 1.0) for name in names}))
    )


SAMPLES = {
    "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0": (
        "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0"
    ),
    "lora_te_text_model_encoder_layers_11_mlp_fc1": (
        "text_encoder.text_model.encoder.layers.11.mlp.fc1"
    ),
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    ),
    "lora_unet_output_blocks_2_2_conv": "unet.up_blocks.0.upsamplers.0.conv",
    "lora_unet_input_blocks_3_0_op": "unet.down_blocks.0.downsamplers.0.conv",
    "lora_te2_text_projection": "text_encoder_2.text_projection",
    "lora_unet_joint_blocks_5_x_block_mlp_fc1": ("transformer.transformer_blocks.5.ff.net.0.proj"),
    "lora_transformer_single_transformer_blocks_7_proj_out": (
        "transformer.single_transformer_blocks.7.proj_out"
    ),
    "lora_unet_blocks_12_cross_attn_k_img": "transformer.blocks.12.attn2.add_k_proj",
    "lora_unet_double_blocks_3_txt_mlp_fc2": "transformer.transformer_blocks.3.ff_context.net.2",
    "lora_unet_transformer_blocks_59_attn_to_add_out": (
        "transformer.transformer_blocks.59.attn.to_add_out"
    ),
    "lora_unet_layers_29_feed_forward_w3": "transformer.layers.29.feed_forward.w3",
    "lora_unet_layers_29_attention_to_out_0": "transformer.layers.29.attention.to_out.0",
}


@pytest.mark.parametrize("name", SAMPLES)
def test_names_of_kohya_files_are_paths_in_diffusers(name: str, tmp_path) -> None:
    assert list(renamed(kohya(tmp_path, name), "diffusers").modules) == [SAMPLES[name]]


def test_the_third_text_encoder_of_sd_scripts_is_the_second_of_diffusers_in_flux(tmp_path) -> None:
    flux = "lora_unet_double_blocks_0_img_mod_lin"
    names = ["lora_te3_encoder_block_0_layer_0_SelfAttention_q"]
    found = renamed(kohya(tmp_path, flux, *names), "diffusers")
    assert "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q" in found.modules
    stable = "lora_unet_joint_blocks_0_x_block_mlp_fc1"
    found = renamed(kohya(tmp_path, stable, *names), "diffusers")
    assert "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q" in found.modules


def test_onetrainer_counts_the_text_encoders_of_flux_as_diffusers_does(tmp_path) -> None:
    text = "encoder_block_0_layer_0_SelfAttention_q"
    flux = "lora_transformer_single_transformer_blocks_0_norm_linear"
    found = renamed(kohya(tmp_path, flux, f"lora_te2_{text}"), "diffusers")
    assert "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q" in found.modules
    assert f"lora_te3_{text}" in renamed(found, "kohya").modules


def test_names_that_several_families_read_differently_are_refused(tmp_path) -> None:
    alone = kohya(tmp_path, "lora_te3_encoder_block_0_layer_0_SelfAttention_q")
    with pytest.raises(IncompatibleError, match=r"several families .* Flux, Stable Diffusion 3"):
        renamed(alone, "diffusers")


def test_among_families_that_fit_the_one_whose_blocks_are_all_there_is_meant(tmp_path) -> None:
    names = [f"transformer_blocks.{block}.attn.to_q" for block in range(60)]
    path = write_peft(tmp_path / "qwen", {name: pair(6, 6) for name in names})
    found = renamed(open_adapter(str(path)), "comfy")
    assert set(found.modules) == {f"diffusion_model.{name}" for name in names}
    path = write_peft(tmp_path / "flux", {name: pair(6, 6) for name in names[:19]})
    found = renamed(open_adapter(str(path)), "comfy")
    assert "diffusion_model.double_blocks.18.img_attn.qkv" in found.modules


def test_the_model_for_low_noise_of_wan_is_a_file_of_its_own_elsewhere(tmp_path) -> None:
    names = [f"transformer_2.blocks.{block}.attn1.to_{x}" for block in (0, 29) for x in "qkv"]
    path = tmp_path / "a.safetensors"
    tensors = {}
    for name in names:
        A, B = pair(6, 6)
        tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
    save(path, tensors, "float32")
    adapter = open_adapter(str(path))
    assert adapter.layout == "diffusers"
    there = renamed(adapter, "comfy")
    theirs = [f"diffusion_model.blocks.{block}.self_attn.{x}" for block in (0, 29) for x in "qkv"]
    assert set(there.modules) == set(theirs)
    # Elsewhere nothing tells the two models apart; diffusers loads either as `transformer`.
    back = renamed(there, "diffusers")
    assert set(back.modules) == {name.replace("transformer_2", "transformer") for name in names}


def test_an_adapter_of_both_models_of_wan_is_no_single_file(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {}
    for name in ("transformer.blocks.0.attn1.to_q", "transformer_2.blocks.0.attn1.to_q"):
        A, B = pair(6, 6)
        tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
    save(path, tensors, "float32")
    with pytest.raises(IncompatibleError, match=r"1 of 2 have no counterpart in comfy"):
        renamed(open_adapter(str(path)), "comfy")


def test_names_without_a_counterpart_are_listed(tmp_path) -> None:
    found = kohya(tmp_path, "lora_unet_single_blocks_0_linear2", "lora_unet_single_blocks_0_norm")
    message = "1 of 2 have no counterpart in diffusers: lora_unet_single_blocks_0_norm"
    with pytest.raises(IncompatibleError, match=message):
        renamed(found, "diffusers")
    with pytest.raises(IncompatibleError, match="none of its 1 module names is of a model"):
        renamed(kohya(tmp_path, "lora_unet_mystery"), "diffusers")


def test_a_fused_layer_of_another_shape_is_no_layer_of_the_family(tmp_path) -> None:
    found = kohya(tmp_path, "lora_unet_double_blocks_0_img_attn_qkv", rows=10)
    with pytest.raises(IncompatibleError, match=r"none of its 1 module names"):
        renamed(found, "diffusers")


def test_one_component_becomes_a_plain_model_and_two_do_not(tmp_path) -> None:
    single = "lora_unet_single_blocks_0_modulation_lin"
    found = renamed(renamed(kohya(tmp_path, single), "diffusers"), "model")
    assert list(found.modules) == ["single_transformer_blocks.0.norm.linear"]
    both = kohya(tmp_path, single, "lora_te1_text_model_encoder_layers_0_mlp_fc1")
    with pytest.raises(IncompatibleError, match="adapts 2 models, text_encoder, transformer"):
        renamed(renamed(both, "diffusers"), "model")


def test_a_layer_adapted_under_two_names_is_refused(tmp_path) -> None:
    twice = kohya(
        tmp_path,
        "lora_unet_single_blocks_0_modulation_lin",
        "lora_unet_single_transformer_blocks_0_norm_linear",
    )
    with pytest.raises(IncompatibleError, match=r"adapts transformer\.single.* twice: lora_unet"):
        renamed(twice, "diffusers")
