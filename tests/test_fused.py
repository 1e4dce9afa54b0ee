"""Fused layers against their parts: taken apart and put together exactly, and no larger."""

from pathlib import Path

import numpy as np
import pytest

from loramerge.adapter import Adapter
from loramerge.io._names import renamed
from loramerge.io._open import open_adapter
from tests.build import write_kohya, write_peft

WIDTH = 6
QKV = "lora_unet_double_blocks_0_img_attn_qkv"
LINEAR1 = "lora_unet_single_blocks_0_linear1"
BLOCK, SINGLE = "transformer.transformer_blocks.0.attn", "transformer.single_transformer_blocks.0"
PARTS = {
    QKV: {f"{BLOCK}.to_q": 6, f"{BLOCK}.to_k": 6, f"{BLOCK}.to_v": 6},
    LINEAR1: {
        f"{SINGLE}.attn.to_q": 6,
        f"{SINGLE}.attn.to_k": 6,
        f"{SINGLE}.attn.to_v": 6,
        f"{SINGLE}.proj_mlp": 24,
    },
}
FLUX = {"base_model_name_or_path": "black-forest-labs/FLUX.1-dev"}
SD3 = {"ss_base_model_version": "sd3-m"}
draw = np.random.default_rng(7)


def normal(*shape: int) -> np.ndarray:
    return draw.standard_normal(shape).astype(np.float32)


def delta(adapter: Adapter, name: str) -> np.ndarray:
    update = adapter.read(name, wide=True)
    return update.B @ update.A


def fused(path: Path, rank: int = 4) -> Adapter:
    """qkv of a double and linear1 of a single block, with alpha 1."""
    modules = {
        name: (normal(rank, WIDTH), normal(sum(parts.values()), rank), 1.0)
        for name, parts in PARTS.items()
    }
    return open_adapter(str(write_kohya(path / "fused.safetensors", modules)))


def split(path: Path, ranks: tuple[int, ...], **config: object) -> Adapter:
    """The q, k and v of a double block of a plain Flux model, each with an A of its own."""
    names = [name.removeprefix("transformer.") for name in PARTS[QKV]]
    modules = {
        name: (normal(rank, WIDTH), normal(WIDTH, rank))
        for name, rank in zip(names, ranks, strict=False)
    }
    modules["single_transformer_blocks.0.norm.linear"] = (normal(2, WIDTH), normal(3 * WIDTH, 2))
    return open_adapter(str(write_peft(path / "split", modules, r=2, **FLUX, **config)))


def test_parts_of_a_fused_layer_are_rows_of_its_delta_weight(tmp_path: Path) -> None:
    whole = fused(tmp_path)
    apart = renamed(whole, "diffusers")
    assert set(apart.modules) == {part for parts in PARTS.values() for part in parts}
    for name, parts in PARTS.items():
        stacked = np.concatenate([delta(apart, part) for part in parts])
        np.testing.assert_array_equal(stacked, delta(whole, name))
        for part, rows in parts.items():
            assert apart.modules[part].shape == (rows, WIDTH)
            assert apart.modules[part].rank == 4


def test_there_and_back_a_fused_layer_is_itself_to_the_bit(tmp_path: Path) -> None:
    whole = fused(tmp_path)
    again = renamed(renamed(whole, "diffusers"), "kohya")
    assert set(again.modules) == set(whole.modules)
    for name, module in whole.modules.items():
        assert (again.modules[name].rank, again.modules[name].scaling) == (4, module.scaling)
        for part in ("A", "B"):
            np.testing.assert_array_equal(
                getattr(again.read(name), part), getattr(whole.read(name), part)
            )


def test_parts_with_an_input_factor_each_are_stacked_and_come_back_to_the_bit(
    tmp_path: Path,
) -> None:
    apart = split(tmp_path, (2, 1, 3))
    stacked = renamed(apart, "kohya")
    assert stacked.modules[QKV].rank == 2 + 1 + 3
    again = renamed(stacked, "model")
    assert set(again.modules) == set(apart.modules)
    for name in apart.modules:
        np.testing.assert_array_equal(again.read(name).A, apart.read(name).A)
        np.testing.assert_array_equal(again.read(name).B, apart.read(name).B)


def test_parts_that_share_their_input_factor_need_no_more_rank(tmp_path: Path) -> None:
    A = normal(3, WIDTH)
    names = [name.removeprefix("transformer.") for name in PARTS[QKV]]
    modules = {name: (A, normal(WIDTH, 3)) for name in names}
    modules["single_transformer_blocks.0.norm.linear"] = (normal(3, WIDTH), normal(3 * WIDTH, 3))
    apart = open_adapter(str(write_peft(tmp_path / "a", modules, **FLUX)))
    stacked = renamed(apart, "kohya")
    assert stacked.modules[QKV].rank == 3
    expected = np.concatenate([delta(apart, name) for name in names])
    np.testing.assert_array_equal(delta(stacked, QKV), expected)


def test_parts_of_different_scale_are_stacked_with_their_scale(tmp_path: Path) -> None:
    apart = split(tmp_path, (2, 2, 2), alpha_pattern={"to_k": 3})
    stacked = renamed(apart, "kohya")
    assert stacked.modules[QKV].scaling == 1
    names = [f"transformer_blocks.0.attn.to_{letter}" for letter in "qkv"]
    expected = np.concatenate([delta(apart, name) for name in names])
    # One rounding of B to float32 where it is scaled.
    np.testing.assert_allclose(delta(stacked, QKV), expected, rtol=1e-6, atol=1e-6)


def test_parts_of_scale_zero_are_stacked_to_zero(tmp_path: Path) -> None:
    stacked = renamed(split(tmp_path, (2, 2, 2), lora_alpha=0), "kohya")
    assert not delta(stacked, QKV).any()


def test_a_part_that_is_not_adapted_is_zero_in_the_whole_and_absent_again(tmp_path: Path) -> None:
    apart = split(tmp_path, (2, 1))
    stacked = renamed(apart, "kohya")
    assert stacked.modules[QKV].shape == (3 * WIDTH, WIDTH)
    assert stacked.modules[QKV].rank == 3
    assert not delta(stacked, QKV)[2 * WIDTH :].any()
    assert set(renamed(stacked, "model").modules) == set(apart.modules)


def test_split_qkv_of_sd_scripts_comes_apart_into_its_three_adapters(tmp_path: Path) -> None:
    file = Path(__file__).parents[1] / "fixtures" / "kohya" / "split_qkv.safetensors"
    whole = open_adapter(str(file))
    apart = renamed(whole, "diffusers")
    assert [module.rank for module in apart.modules.values()] == [2, 2, 2]
    stacked = np.concatenate([delta(apart, name) for name in apart.modules])
    np.testing.assert_array_equal(stacked, delta(whole, QKV))


@pytest.mark.parametrize("last", [False, True])
def test_shift_and_scale_change_places_where_diffusers_has_them_so(
    last: bool, tmp_path: Path
) -> None:
    name = "lora_unet_joint_blocks_23_context_block_adaLN_modulation_1"
    B = normal((2 if last else 6) * WIDTH, 2)
    modules = {name: (normal(2, WIDTH), B, 2.0)}
    whole = open_adapter(str(write_kohya(tmp_path / "sd3.safetensors", modules, metadata=SD3)))
    apart = renamed(whole, "diffusers")
    (part,) = apart.modules
    assert part == "transformer.transformer_blocks.23.norm1_context.linear"
    expected = np.concatenate([B[WIDTH:], B[:WIDTH]]) if last else B
    np.testing.assert_array_equal(apart.read(part).B, expected)
    np.testing.assert_array_equal(renamed(apart, "kohya").read(name).B, B)
