"""SoRA: gates fold exactly, closed ones go, and plain adapters are pruned by singular values."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loramerge as lm
from loramerge.adapter import LowRank, Updates
from loramerge.algorithms.prune import PruneOptions, prune
from tests.build import write_peft
from tests.typed import typed

ALPHA, RANK = 16.0, 4
GATES = {"layer.0.query": [0.7, 0.0, -1.3, 0.02], "layer.1.query": [0.0, 0.0, 0.0, 0.5]}


def checkpoint(path: Path, gates: dict[str, list[float]]) -> dict[str, np.ndarray]:
    """Write an OpenDelta checkpoint with a layer norm; return its tensors in float64."""
    rng = np.random.default_rng(7)
    tensors = {"layer.0.LayerNorm.weight": rng.standard_normal(6).astype(np.float32)}
    for name, values in gates.items():
        stem = f"{name}.lora."
        tensors[stem + "lora_A"] = rng.standard_normal((RANK, 6)).astype(np.float32)
        tensors[stem + "lora_B"] = rng.standard_normal((5, RANK)).astype(np.float32)
        tensors[stem + "gate"] = np.asarray([values], np.float32)
    save_file(tensors, path)
    return {key: value.astype(np.float64) for key, value in tensors.items()}


def expected(tensors: dict[str, np.ndarray], name: str, threshold: float = 0.0) -> np.ndarray:
    """alpha / r B diag(g) A, gates below the threshold closed."""
    A, B, gate = (tensors[f"{name}.lora.{part}"] for part in ("lora_A", "lora_B", "gate"))
    g = np.where(np.abs(gate[0]) > threshold, gate[0], 0.0)
    return ALPHA / RANK * B @ np.diag(g) @ A


def delta(result: "lm.Result", name: str) -> np.ndarray:
    update = result.adapter.read(name)
    return update.B.astype(np.float64) @ update.A.astype(np.float64)


def test_a_sora_checkpoint_folds_exactly_and_closed_gates_take_no_rank(tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path / "sora.safetensors", GATES)
    adapter = lm.load(tmp_path / "sora.safetensors", alpha=ALPHA)
    assert {m.name: m.rank for m in adapter.modules.values()} == {
        "layer.0.query": 3,
        "layer.1.query": 1,
    }
    result, report = lm.prune(adapter)
    for name in GATES:  # float32 factors: 1e-6 of the delta weight
        np.testing.assert_allclose(delta(result, name), expected(tensors, name), atol=2e-6)
    assert [module.rank for module in report.modules] == [3, 1]


def test_layer_norms_beside_the_gates_are_carried_and_named(tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path / "sora.safetensors", GATES)
    result, report = lm.prune(lm.load(tmp_path / "sora.safetensors", alpha=ALPHA))
    assert any("layer.0.LayerNorm.weight" in note for note in report.notes)
    stored = load_file(result.adapter.source.path)["base_model.model.layer.0.LayerNorm.weight"]
    np.testing.assert_array_equal(stored, tensors["layer.0.LayerNorm.weight"])


def test_the_threshold_is_absolute_on_the_gates_as_in_the_paper(tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path / "sora.safetensors", GATES)
    adapter = lm.load(tmp_path / "sora.safetensors", alpha=ALPHA)
    result, report = lm.prune(adapter, threshold=0.1, absolute=True)
    assert [module.rank for module in report.modules] == [2, 1]
    found = delta(result, "layer.0.query")
    np.testing.assert_allclose(found, expected(tensors, "layer.0.query", 0.1), atol=2e-6)


def test_a_module_whose_gates_are_all_closed_is_named(tmp_path: Path) -> None:
    checkpoint(tmp_path / "sora.safetensors", {**GATES, "layer.2.query": [0.0] * RANK})
    adapter = lm.load(tmp_path / "sora.safetensors", alpha=ALPHA)
    assert "layer.2.query" not in adapter.modules
    assert any("every gate is closed in 1 modules" in note for note in adapter.assumed)


def test_a_checkpoint_without_alpha_says_that_scale_1_is_assumed(tmp_path: Path) -> None:
    checkpoint(tmp_path / "sora.safetensors", GATES)
    assert lm.load(tmp_path / "sora.safetensors").scale_assumed


@pytest.fixture
def plain(tmp_path: Path, rng: np.random.Generator) -> tuple[Path, np.ndarray]:
    """An adapter of one module with singular values 8, 4, 1, 0.1, and its delta weight."""
    U = np.linalg.qr(rng.standard_normal((9, 4)))[0]
    V = np.linalg.qr(rng.standard_normal((7, 4)))[0]
    mix = rng.standard_normal((4, 4))
    B = (U * [8, 4, 1, 0.1]) @ mix
    A = np.linalg.inv(mix) @ V.T
    pair = (A.astype(np.float32), B.astype(np.float32))
    return write_peft(tmp_path / "plain", {"lin": pair}, lora_alpha=4), B @ A


@pytest.mark.parametrize(("threshold", "rank"), [(0.0, 4), (0.05, 3), (0.2, 2), (0.6, 1)])
def test_hard_pruning_of_a_plain_adapter_is_truncation(
    plain: tuple[Path, np.ndarray], threshold: float, rank: int
) -> None:
    path, dense = plain
    result, report = lm.prune(path, threshold=threshold)
    U, s, Vh = np.linalg.svd(dense)
    best = (U[:, :rank] * s[:rank]) @ Vh[:rank]
    assert report.modules[0].rank == rank
    np.testing.assert_allclose(delta(result, "lin"), best, atol=1e-5)  # float32 inputs


def test_soft_pruning_is_the_proximal_step_of_the_nuclear_norm(
    plain: tuple[Path, np.ndarray],
) -> None:
    path, dense = plain
    result, _ = lm.prune(path, threshold=0.5, absolute=True, shrink="soft")
    U, s, Vh = np.linalg.svd(dense, full_matrices=False)
    shrunk = (U * np.maximum(s - 0.5, 0)) @ Vh
    np.testing.assert_allclose(delta(result, "lin"), shrunk, atol=1e-5)


def test_keep_bounds_the_terms_of_every_module(plain: tuple[Path, np.ndarray]) -> None:
    _, report = lm.prune(plain[0], keep=2)
    assert report.modules[0].rank == 2


def test_raw_pruning_ranks_terms_by_the_product_of_their_norms() -> None:
    A = np.diag([1.0, 3.0, 2.0])[None]
    B = np.ones((1, 3, 3))
    updates = Updates((LowRank(A, B),), (1.0,), (1.0,))
    kept = prune(updates, PruneOptions(gauge="raw", keep=1))
    assert isinstance(kept, LowRank)
    np.testing.assert_allclose(kept.B @ kept.A, (B[..., 1:2] @ A[..., 1:2, :]), atol=1e-12)


@pytest.mark.parametrize("bound", [{}, {"rank": 2}])
def test_the_error_of_pruning_is_measured_against_the_input(
    plain: tuple[Path, np.ndarray], bound: dict[str, int]
) -> None:
    path, dense = plain
    result, report = lm.prune(path, keep=2, save_dtype="bfloat16", **bound)
    error = np.linalg.norm(delta(result, "lin") - dense) / np.linalg.norm(dense)
    assert report.relative_error == pytest.approx(error, rel=1e-4)  # float32 factors


def test_pruning_as_trained_is_warned_about_before_and_after(
    plain: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain[0].parent)
    for more in (["--dry-run"], []):
        done = typed("prune", "plain", "--keep", "2", "--gauge", "raw", *more)
        assert any(line.strip().startswith("warning  --gauge raw drops") for line in done.lines)
    assert "warning" not in typed("prune", "plain", "--keep", "2", "-f").err


def test_a_gauge_without_a_say_is_named(tmp_path: Path) -> None:
    checkpoint(tmp_path / "sora.safetensors", GATES)
    adapter = lm.load(tmp_path / "sora.safetensors", alpha=ALPHA)
    raw, report = lm.prune(adapter, gauge="raw")
    assert "--gauge raw changes nothing: the checkpoint has gates of its own" in report.notes
    svd, report = lm.prune(adapter)
    assert not any("--gauge" in note for note in report.notes)
    for name in GATES:
        np.testing.assert_array_equal(delta(raw, name), delta(svd, name))
