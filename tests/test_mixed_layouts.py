"""Adapters of one model in different layouts: merged, compared and written in either."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from loramerge.io._open import open_adapter
from tests.build import write_kohya, write_peft
from tests.typed import typed

WIDTH, RANK = 6, 2
QKV, LINEAR2 = "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_0_linear2"
LINEAR1 = "lora_unet_single_blocks_0_linear1"
CLIP = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
SHAPES = {
    QKV: (3 * WIDTH, WIDTH),
    LINEAR1: (7 * WIDTH, WIDTH),
    LINEAR2: (WIDTH, 5 * WIDTH),
    CLIP: (WIDTH, WIDTH),
}
FLUX = {"ss_base_model_version": "flux1"}
draw = np.random.default_rng(1)


def normal(*shape: int) -> np.ndarray:
    return draw.standard_normal(shape).astype(np.float32)


def kohya(path: Path) -> Path:
    modules = {
        name: (normal(RANK, width), normal(rows, RANK), 1.0)
        for name, (rows, width) in SHAPES.items()
    }
    return write_kohya(path, modules, metadata=FLUX)


def converted(file: Path, layout: str, out: Path, *words: str) -> Path:
    """The adapter in another layout, with every rank it has."""
    done = typed("squeeze", file, "--energy", "1", "--to", layout, "-o", out, *words)
    assert done.code == 0, done.err
    return out


def deltas(path: Path) -> dict[str, np.ndarray]:
    adapter = open_adapter(str(path))
    updates = {name: adapter.read(name, wide=True) for name in adapter.modules}
    return {name: update.B @ update.A for name, update in updates.items()}


def assert_equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert set(a) == set(b)
    for name, delta in a.items():
        # Factors are rounded to float32 once; the sum is measured by the norm of the module.
        assert np.linalg.norm(b[name] - delta) <= 1e-6 * np.linalg.norm(delta), name


@pytest.mark.parametrize("layout", ["comfy", "diffusers"])
def test_an_adapter_is_the_same_in_another_layout_and_back(layout: str, tmp_path: Path) -> None:
    file = kohya(tmp_path / "a.safetensors")
    out = tmp_path / ("there" if layout == "diffusers" else "there.safetensors")
    there = converted(file, layout, out, "--layout", "pattern")
    back = converted(there, "kohya", tmp_path / "back.safetensors", "--layout", "pattern")
    assert_equal(deltas(back), deltas(file))


def test_the_difference_of_an_adapter_in_two_layouts_is_none(tmp_path: Path) -> None:
    file = kohya(tmp_path / "a.safetensors")
    there = converted(file, "diffusers", tmp_path / "there")
    for pair in ((file, there), (there, file)):
        done = typed("diff", *pair, "--fail-above", "1e-6")
        assert done.code == 0, done.out + done.err


@pytest.mark.parametrize("turned", [False, True])
def test_a_sum_over_layouts_is_the_sum_of_delta_weights(turned: bool, tmp_path: Path) -> None:
    a, b = kohya(tmp_path / "a.safetensors"), kohya(tmp_path / "b.safetensors")
    other = converted(b, "diffusers", tmp_path / "other")
    words = [other, a, "-w", "-0.5", "-w", "2"] if turned else [a, other, "-w", "2", "-w", "-0.5"]
    done = typed("cat", *words, "--to", "kohya", "-o", tmp_path / "out.safetensors")
    assert done.code == 0, done.err
    one, two = deltas(a), deltas(b)
    wanted = {name: 2 * one[name] - 0.5 * two[name] for name in one}
    assert_equal(wanted, deltas(tmp_path / "out.safetensors"))


def test_a_result_is_in_the_first_adapters_layout_and_says_so(tmp_path: Path) -> None:
    a, b = kohya(tmp_path / "a.safetensors"), kohya(tmp_path / "b.safetensors")
    other = converted(b, "comfy", tmp_path / "other.safetensors")
    done = typed("cat", a, other, "-o", tmp_path / "out.safetensors")
    assert done.code == 0, done.err
    assert "written as kohya (--to chooses another)" in done.out + done.err
    assert set(open_adapter(str(tmp_path / "out.safetensors")).modules) == set(SHAPES)


def test_a_plain_peft_adapter_of_a_transformer_merges_with_the_pipelines(tmp_path: Path) -> None:
    path = "single_transformer_blocks.0.proj_out"
    A, B = normal(RANK, 5 * WIDTH), normal(WIDTH, RANK)
    base = {"base_model_name_or_path": "black-forest-labs/FLUX.1-dev"}
    plain = write_peft(tmp_path / "plain", {path: (A, B)}, **base)
    tensors = {f"transformer.{path}.lora_A.weight": A, f"transformer.{path}.lora_B.weight": B}
    save_file(tensors, tmp_path / "pipeline.safetensors")
    done = typed("cat", plain, tmp_path / "pipeline.safetensors", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    wanted = 2 * B.astype(np.float64) @ A
    assert_equal({path: wanted}, deltas(tmp_path / "out"))


def sdxl(path: Path, unet: str) -> Path:
    text = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    modules = {
        name: (normal(RANK, WIDTH), normal(WIDTH, RANK), 1.0)
        for name in (f"lora_unet_{unet}_transformer_blocks_0_attn1_to_q", text)
    }
    return write_kohya(path, modules)


def test_both_spellings_of_sdxl_in_kohyas_layout_are_one_model(tmp_path: Path) -> None:
    a = sdxl(tmp_path / "a.safetensors", "input_blocks_4_1")
    b = sdxl(tmp_path / "b.safetensors", "down_blocks_1_attentions_0")
    done = typed("cat", a, b, "-o", tmp_path / "out.safetensors")
    assert done.code == 0, done.err
    one, two = deltas(a), deltas(b)
    wanted = {name: x + y for (name, x), y in zip(one.items(), two.values(), strict=True)}
    assert_equal(wanted, deltas(tmp_path / "out.safetensors"))


def test_names_stay_as_they_are_where_all_adapters_have_them(tmp_path: Path) -> None:
    a, b = (sdxl(tmp_path / f"{n}.safetensors", "down_blocks_1_attentions_0") for n in "ab")
    done = typed("cat", a, b, "-o", tmp_path / "out.safetensors")
    assert done.code == 0, done.err
    assert set(deltas(tmp_path / "out.safetensors")) == set(deltas(a))
