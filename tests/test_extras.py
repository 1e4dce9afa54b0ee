"""Heads beside the LoRA in a merge: the mean of all, where all have the same."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.build import write_peft
from tests.typed import typed

KEY = "base_model.model.score.weight"


def with_head(path: Path, seed: int, labels: int = 3) -> Path:
    rng = np.random.default_rng(seed)
    pair = (
        rng.standard_normal((2, 6)).astype(np.float32),
        rng.standard_normal((4, 2)).astype(np.float32),
    )
    head = rng.standard_normal((labels, 6)).astype(np.float32)
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
