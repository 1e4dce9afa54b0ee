"""Heads beside the LoRA: the mean of all, where all have the same, and numbers that are none."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from loramerge.compute import holds_numbers
from tests.build import write_peft
from tests.typed import typed

KEY = "base_model.model.score.weight"


def with_head(path: Path, seed: int, labels: int = 3, first: float = 0.0) -> Path:
    rng = np.random.default_rng(seed)
    pair = (
        rng.standard_normal((2, 6)).astype(np.float32),
        rng.standard_normal((4, 2)).astype(np.float32),
    )
    head = rng.standard_normal((labels, 6)).astype(np.float32)
    head[0, 0] += first
    return write_peft(
        path, {"lin": pair}, r=2, lora_alpha=2, extras={KEY: head}, modules_to_save=["score"]
    )


def test_the_mean_of_heads_is_written(tmp_path: Path) -> None:
    folders = [with_head(tmp_path / str(seed), seed) for seed in range(3)]
    done = typed("cat", *folders, "--extras", "mean", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert f"the mean of all adapters: {KEY}" in done.err
    heads = [load_file(folder / "adapter_model.safetensors")[KEY] for folder in folders]
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")[KEY]
    # Added in float64, rounded once.
    np.testing.assert_array_equal(found, np.mean(heads, axis=0, dtype=np.float64).astype("f4"))


@pytest.mark.parametrize("labels", [2, 5])
def test_heads_of_other_labels_have_no_mean(tmp_path: Path, labels: int) -> None:
    one, two = with_head(tmp_path / "a", 1), with_head(tmp_path / "b", 2, labels)
    done = typed("cat", one, two, "--extras", "mean", "-o", tmp_path / "out")
    assert done.code == 1
    assert "--extras mean needs the same tensors in every adapter" in done.err
    assert KEY in done.err
    assert not (tmp_path / "out").exists()


def test_what_another_layout_cannot_hold_may_be_left_out(tmp_path: Path) -> None:
    one, two = with_head(tmp_path / "a", 1), with_head(tmp_path / "b", 2)
    words = ("cat", one, two, "--to", "mlx", "-o", tmp_path / "out")
    assert "mlx cannot hold" in typed(*words).err
    done = typed(*words, "--extras", "drop")
    assert done.code == 0, done.err
    assert f"dropped: a: {KEY}, b: {KEY}" in done.err
    assert "1 of 1 merged, 4 of 6 tensors" in done.err


@pytest.mark.parametrize(("extras", "tensors"), [("first", 5), ("mean", 6), ("drop", 4)])
def test_how_many_tensors_are_in_the_result_is_said(
    extras: str, tensors: int, tmp_path: Path
) -> None:
    one, two = with_head(tmp_path / "a", 1), with_head(tmp_path / "b", 2)
    done = typed("cat", one, two, "--extras", extras, "-o", tmp_path / "out")
    assert f"1 of 1 merged, {tensors} of 6 tensors" in done.err


@pytest.mark.parametrize("flaw", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "words",
    [
        "squeeze a -r 1",
        "cat a",
        "cat b a --extras mean",
        "select a --ranks 0",
        "convert a --to peft",
    ],
)
def test_what_is_carried_and_is_no_number_is_named(
    words: str, flaw: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with_head(Path("a"), 1, first=flaw)
    with_head(Path("b"), 2)
    line = (*words.split(), "-o", "out")
    done = typed(*line)
    assert done.code == 0, done.err
    assert f"warning  NaN or Inf beside the LoRA, carried as it is: {KEY}" in done.err
    assert np.isfinite(load_file("out/adapter_model.safetensors")[KEY]).sum() == 17
    assert json.loads(typed(*line, "-f", "--json").out)["not_finite"] == [KEY]
    assert json.loads(Path("out/loramerge.json").read_text())["not_finite"] == [KEY]


@pytest.mark.parametrize("words", ["squeeze a -r 1", "convert a --to peft"])
def test_of_numbers_that_are_carried_nothing_is_said(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(with_head(tmp_path / "a", 1).parent)
    done = typed(*words.split(), "-o", "out", "--json")
    assert json.loads(done.out)["not_finite"] == []
    assert "Inf" not in done.out + done.err


# What float16 cannot hold, and what is none.
@pytest.mark.parametrize("first", [1e6, np.nan])
def test_a_head_that_a_model_would_not_hold_is_not_baked(
    first: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(with_head(tmp_path / "a", 1, first=first).parent)
    Path("base").mkdir()
    shapes = {"lin.weight": (4, 6), "score.weight": (3, 6)}
    weights = {key: np.zeros(shape, np.float16) for key, shape in shapes.items()}
    save_file(weights, "base/model.safetensors")
    done = typed("bake", "a", "--base", "base", "-o", "out")
    assert done.code == 1
    assert done.lines[0] == f"error: {KEY} is not finite as F16."
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("dtype", "name", "bits"),
    [
        (torch.float16, "F16", np.arange(1 << 16, dtype=np.uint16)),
        (torch.bfloat16, "BF16", np.arange(1 << 16, dtype=np.uint16)),
        (torch.float8_e5m2, "F8_E5M2", np.arange(1 << 8, dtype=np.uint8)),
        (torch.float8_e4m3fn, "F8_E4M3", np.arange(1 << 8, dtype=np.uint8)),
        # Of the wide ones every sign and exponent, with nothing, little or all behind them.
        (torch.float32, "F32", (np.arange(1 << 9) << 23)[:, None] + [0, 1, (1 << 23) - 1]),
        (torch.float64, "F64", (np.arange(1 << 12) << 52)[:, None] + [0, 1, (1 << 52) - 1]),
    ],
)
def test_torch_knows_the_same_numbers_by_their_bits(
    dtype: torch.dtype, name: str, bits: np.ndarray
) -> None:
    stored = bits.astype(np.uint32 if name == "F32" else bits.dtype).ravel()
    told = torch.from_numpy(stored.copy()).view(dtype).double().isfinite().tolist()
    assert [holds_numbers(one.tobytes(), name) for one in stored] == told
    assert not all(told)
    sound = stored[np.array(told)]
    assert holds_numbers(sound.tobytes(), name)
    assert not holds_numbers(stored.tobytes(), name)


def test_no_bytes_and_whole_numbers_are_numbers() -> None:
    assert holds_numbers(b"", "F32")
    assert holds_numbers(b"\xff" * 8, "I64")


DIFFERENCES = ("lycoris_attn_norm.w_norm", "lycoris_attn_norm.b_norm", "lycoris_attn_to_q.diff_b")


def of_lycoris(path: Path, seed: int) -> dict[str, np.ndarray]:
    """A LoCon with what LyCORIS trains of norms and biases; only that."""
    draw = np.random.default_rng(seed)
    shapes = {"lora_down.weight": (2, 6), "lora_up.weight": (4, 2)}
    pairs = {
        f"lycoris_attn_to_{leaf}.{end}": draw.standard_normal(shape).astype("f4")
        for leaf in "qk"
        for end, shape in shapes.items()
    }
    beside = {key: draw.standard_normal(4).astype("f4") for key in DIFFERENCES}
    save_file({**pairs, **beside}, path)
    return beside


@pytest.mark.parametrize(
    "words",
    [
        ("convert", "a.safetensors", "--to", "kohya"),
        ("select", "a.safetensors", "--include", "*to_k"),
        ("squeeze", "a.safetensors", "-r", "1"),
        ("cat", "a.safetensors", "b.safetensors", "--extras", "first"),
    ],
)
def test_norms_and_biases_of_lycoris_are_written_as_they_are_said_to_be(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = of_lycoris(Path("a.safetensors"), 1)
    of_lycoris(Path("b.safetensors"), 2)
    done = typed(*words, "-o", "out.safetensors")
    assert done.code == 0, done.err
    found = load_file("out.safetensors")
    for key, values in wanted.items():
        np.testing.assert_array_equal(found[key], values)
    again = typed("squeeze", "out.safetensors", "-r", "1", "-o", "again.safetensors")
    assert again.code == 0, again.err


def test_the_mean_of_what_lycoris_trains_beside_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = (of_lycoris(Path(f"{n}.safetensors"), n) for n in (1, 2))
    words = ("cat", "1.safetensors", "2.safetensors", "--extras", "mean", "-o", "out.safetensors")
    assert typed(*words).code == 0
    found = load_file("out.safetensors")
    for key in DIFFERENCES:
        mean = (one[key].astype(float) + two[key]) / 2
        np.testing.assert_array_equal(found[key], mean.astype("f4"))
