"""Bases that are pipelines of several models, against DoRA's formula in float64."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loramerge.io._checkpoint import open_checkpoint
from tests.typed import typed

RANK = 2
UNET, TEXT = "down_blocks.1.attn1.to_q", "text_model.encoder.layers.0.mlp.fc1"
# The two text encoders have one shape, so that only their names tell them apart.
LAYERS = {"unet": (UNET, (6, 5)), "text_encoder": (TEXT, (7, 4)), "text_encoder_2": (TEXT, (7, 4))}
KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
FILES = dict.fromkeys(LAYERS, "model.safetensors")
FILES["unet"] = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a pipeline of a unet and two text encoders."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(7)
    for name, (layer, shape) in LAYERS.items():
        folder = tmp_path / "pipe" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        weights = {f"{layer}.weight": draw.standard_normal(shape).astype("f4")}
        save_file({**weights, "norm.bias": np.ones(3, "f4")}, folder / FILES[name])
    (tmp_path / "pipe" / "tokenizer").mkdir()
    (tmp_path / "pipe" / "tokenizer" / "vocab.json").write_text("{}")
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    return tmp_path


def weight(folder: Path, name: str) -> np.ndarray:
    return load_file(folder / name / FILES[name])[f"{LAYERS[name][0]}.weight"].astype(float)


def flat(name: str) -> str:
    return f"{KOHYA[name]}_{LAYERS[name][0].replace('.', '_')}"


def dotted(name: str) -> str:
    return f"{name}.{LAYERS[name][0]}"


def decomposed(path: Path, spelt: Callable[[str], str]) -> dict[str, np.ndarray]:
    """A file of DoRAs of every model, and the weights it makes of theirs."""
    draw, stored, wanted = np.random.default_rng(3), {}, {}
    kohya = spelt is flat
    ends = (
        ("lora_down.weight", "lora_up.weight", "dora_scale")
        if kohya
        else ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    )
    for name, (_, shape) in LAYERS.items():
        rows, columns = shape
        A, B = draw.standard_normal((RANK, columns)), draw.standard_normal((rows, RANK))
        lengths = 1 + draw.random((rows, 1) if kohya else rows)
        parts = [x.astype("f4") for x in (A, B, lengths)]
        stored |= {f"{spelt(name)}.{end}": x for end, x in zip(ends, parts, strict=True)}
        down, up, magnitude = (x.astype(float) for x in parts)
        V = weight(Path("pipe"), name) + up @ down
        wanted[name] = magnitude.reshape(-1, 1) * V / np.linalg.norm(V, axis=1, keepdims=True)
    save_file(stored, path)
    return wanted


@pytest.mark.parametrize("spelt", [dotted, flat])
def test_every_model_of_a_pipeline_is_baked_in_its_place(
    here: Path, spelt: Callable[[str], str]
) -> None:
    wanted = decomposed(here / "a.safetensors", spelt)
    for deep in (Path("pipe/.cache/hub"), Path("pipe/unet/onnx/old")):
        deep.mkdir(parents=True)
        (deep / "facts.json").write_text("{}")
    done = typed("bake", "a.safetensors", "--base", "pipe", "-o", "baked")
    assert done.code == 0, done.err
    for name, W in wanted.items():
        # Computed in float32.
        np.testing.assert_allclose(weight(here / "baked", name), W, rtol=1e-5, atol=1e-6)
    # What is no part of a pipeline stays where it is.
    shutil.rmtree("pipe/.cache")
    shutil.rmtree("pipe/unet/onnx")
    files = sorted(str(p.relative_to("pipe")) for p in Path("pipe").rglob("*") if p.is_file())
    assert files == sorted(
        str(p.relative_to("baked")) for p in Path("baked").rglob("*") if p.is_file()
    )


@pytest.mark.parametrize("spelt", [dotted, flat])
def test_a_dora_of_several_models_becomes_plain_lora(
    here: Path, spelt: Callable[[str], str]
) -> None:
    wanted = decomposed(here / "a.safetensors", spelt)
    done = typed("bake", "a.safetensors", "--base", "pipe", "-r", "9", "-o", "plain.safetensors")
    assert done.code == 0, done.err
    assert typed("bake", "plain.safetensors", "--base", "pipe", "-o", "baked").code == 0
    for name, W in wanted.items():
        # Factors and sum in float32.
        np.testing.assert_allclose(weight(here / "baked", name), W, rtol=1e-5, atol=1e-5)


def test_extracting_from_a_pipeline_gives_an_adapter_of_pipelines(here: Path) -> None:
    wanted = decomposed(here / "a.safetensors", dotted)
    assert typed("bake", "a.safetensors", "--base", "pipe", "-o", "tuned").code == 0
    done = typed("extract", "pipe", "tuned", "-r", "9", "-o", "found")
    assert done.code == 0, done.err
    assert "diffusers layout" in done.err
    assert typed("bake", "found", "--base", "pipe", "-o", "baked").code == 0
    for name, W in wanted.items():
        np.testing.assert_allclose(weight(here / "baked", name), W, rtol=1e-5, atol=1e-5)


def test_one_model_is_no_place_for_an_adapter_of_several_and_the_hint_says_which(
    here: Path,
) -> None:
    decomposed(here / "a.safetensors", dotted)
    done = typed("bake", "a.safetensors", "--base", "pipe/unet", "-r", "2", "-o", "plain")
    assert done.code == 1
    assert "unet has no weight for text_encoder" in done.err
    assert "of a pipeline, its whole directory" in done.err


def test_a_model_that_cannot_be_written_is_missed_only_where_all_are_written(here: Path) -> None:
    decomposed(here / "a.safetensors", dotted)
    (here / "pipe" / "vae").mkdir()
    (here / "pipe" / "vae" / "config.json").write_text("{}")
    done = typed("bake", "a.safetensors", "--base", "pipe", "-o", "baked")
    assert done.code == 1
    assert "pipe holds no safetensors weights of vae" in done.err
    assert not Path("baked").exists()
    assert typed("bake", "a.safetensors", "--base", "pipe", "-r", "2", "-o", "plain").code == 0


def test_a_pipeline_without_weights_has_its_own_sentence(here: Path) -> None:
    for name, file in FILES.items():
        (here / "pipe" / name / file).unlink()
    ones = np.ones((1, 1), "f4")
    save_file({f"unet.{UNET}.lora_{x}.weight": ones for x in "AB"}, here / "a.safetensors")
    done = typed("bake", "a.safetensors", "--base", "pipe", "-o", "baked")
    assert done.code == 1
    assert "pipe is a pipeline without safetensors weights" in done.err


def test_a_name_without_a_model_is_found_where_only_one_has_it(here: Path) -> None:
    base = open_checkpoint("pipe")
    assert base.weight(UNET) == f"unet.{UNET}.weight"
    assert base.weight(TEXT) is None
    assert base.weight(f"lycoris_{UNET.replace('.', '_')}") == f"unet.{UNET}.weight"
    assert base.weight("lora_te3_encoder") is None
    # As transformers 5 calls them.
    bare = TEXT.removeprefix("text_model.")
    assert base.weight(f"text_encoder_2.{bare}") == f"text_encoder_2.{TEXT}.weight"
    (here / "new").mkdir()
    save_file({f"{bare}.weight": np.ones((7, 4), "f4")}, here / "new" / "model.safetensors")
    for name in (dotted("text_encoder"), flat("text_encoder")):
        assert open_checkpoint("new").weight(name) == f"{bare}.weight"
