"""The laws of --scale: how long a merge is."""

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

import loramerge
from loramerge.linalg.scales import AUTO_EXPONENT, POLICIES, Totals, factor
from tests.build import Pair, read_deltas, write_peft

M, N, RANK = 96, 80, 4
NAMES = ("one", "two", "three")
# What sets the length whatever the method makes of it.
SETTING = ("auto", "norm", "ls")


def totals(parts: list[np.ndarray], result: np.ndarray | None = None, rows: float = 1.0) -> Totals:
    """Totals of weighted dense updates and a merge of them, their sum unless given."""
    target = sum(parts)
    result = target if result is None else result
    return Totals(
        parts=tuple(float(np.sum(part**2)) for part in parts),
        target=float(np.sum(target**2)),
        result=float(np.sum(result**2)),
        inner=float(np.sum(result * target)),
        rows=rows,
    )


def orthogonal(count: int, norms: list[float] | None = None) -> list[np.ndarray]:
    """Updates that share no entry, of norm 1 or as given."""
    return [np.eye(count)[i] * (norms[i] if norms else 1.0) for i in range(count)]


@pytest.mark.parametrize("name", POLICIES)
def test_one_adapter_comes_back_unchanged(rng: np.random.Generator, name: str) -> None:
    assert factor(name, totals([rng.standard_normal(50)])) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("name", ["auto", "norm"])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_copies_of_one_adapter_come_back_as_that_adapter(
    rng: np.random.Generator, name: str, count: int
) -> None:
    found = factor(name, totals([rng.standard_normal(50)] * count))
    assert found == pytest.approx(1 / count, rel=1e-12)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_auto_gives_orthogonal_adapters_of_equal_norm_a_power_of_their_number(count: int) -> None:
    parts = orthogonal(count)
    length = factor("auto", totals(parts)) * np.linalg.norm(sum(parts))
    assert length == pytest.approx(count**AUTO_EXPONENT, rel=1e-12)


@pytest.mark.parametrize(("count", "share"), [(8, 0.85), (2, 0.95)])
def test_auto_meets_the_lengths_that_were_measured_to_work_best(count: int, share: float) -> None:
    parts = orthogonal(count)
    length = factor("auto", totals(parts)) * np.linalg.norm(sum(parts))
    # The measurement is stated to two digits.
    assert length == pytest.approx(share * np.sqrt(count), abs=0.01 * np.sqrt(count))


def test_auto_takes_no_more_adapters_than_there_are_where_they_cancel() -> None:
    a, b = np.array([1.0, 0.0]), np.array([-1.0, 1e-3])
    parts = [a, b]
    length = factor("auto", totals(parts)) * np.linalg.norm(a + b)
    assert length == pytest.approx(2**AUTO_EXPONENT, rel=1e-5)  # both norms are 1 to 5e-7


def test_auto_of_updates_that_cancel_exactly_is_as_if_they_were_orthogonal() -> None:
    a = np.array([1.0, 2.0])
    found = factor("auto", totals([a, -a], result=a))
    assert found == pytest.approx(2**AUTO_EXPONENT, rel=1e-12)


def test_auto_counts_effective_adapters_between_one_and_all(rng: np.random.Generator) -> None:
    a, b = rng.standard_normal(50), rng.standard_normal(50)
    parts = [a, a + 0.5 * b, 2 * b]
    norms = [np.linalg.norm(part) for part in parts]
    effective = sum(norms) ** 2 / np.linalg.norm(sum(parts)) ** 2
    assert 1 < effective < 3
    length = factor("auto", totals(parts)) * np.linalg.norm(sum(parts))
    assert length == pytest.approx(np.mean(norms) * effective**0.42, rel=1e-12)


def test_norm_gives_the_mean_norm_of_the_inputs() -> None:
    parts = orthogonal(3, norms=[1.0, 2.0, 6.0])
    length = factor("norm", totals(parts)) * np.linalg.norm(sum(parts))
    assert length == pytest.approx(3.0, rel=1e-12)


@pytest.mark.parametrize("name", SETTING)
def test_a_policy_depends_on_the_direction_of_a_merge_alone(
    rng: np.random.Generator, name: str
) -> None:
    parts = [rng.standard_normal(50) for _ in range(3)]
    merge = rng.standard_normal(50)
    once = factor(name, totals(parts, merge)) * merge
    again = factor(name, totals(parts, 7.0 * merge)) * (7.0 * merge)
    np.testing.assert_allclose(again, once, rtol=1e-12)


@pytest.mark.parametrize("name", SETTING)
def test_longer_inputs_give_a_merge_longer_by_as_much(rng: np.random.Generator, name: str) -> None:
    parts = [rng.standard_normal(50) for _ in range(3)]
    merge = rng.standard_normal(50)
    once = factor(name, totals(parts, merge))
    assert factor(name, totals([5.0 * part for part in parts], merge)) == pytest.approx(5 * once)


def test_ls_is_nearer_to_the_weighted_sum_than_any_other_factor(rng: np.random.Generator) -> None:
    parts = [rng.standard_normal(50) for _ in range(3)]
    merge = sum(parts) + 0.5 * rng.standard_normal(50)
    best = factor("ls", totals(parts, merge))
    gaps = [np.linalg.norm(f * merge - sum(parts)) for f in best + np.linspace(-0.5, 0.5, 101)]
    assert np.argmin(gaps) == 50


@pytest.mark.parametrize("count", [1, 4])
def test_size_leaves_one_adapter_and_copies_of_it_as_the_method_does(count: int) -> None:
    parts = [np.array([3.0, 4.0])] * count
    assert factor("size", totals(parts, rows=9)) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize(
    ("length", "wanted"),
    [(0.078, 1.0), (0.1, 0.9167), (0.07, 1.0386), (5.0, 0.8363), (1e-3, 1.0962)],
)
def test_size_shortens_merges_of_updates_that_are_long_beside_orthonormal_rows(
    length: float, wanted: float
) -> None:
    rows = 50
    parts = orthogonal(8, norms=[length * rows**0.5] * 8)
    found = replace(totals(parts, rows=rows), paper=4 * totals(parts).result)
    assert factor("size", found) == pytest.approx(2 * wanted, rel=1e-3)  # 2 is the paper's own


@pytest.mark.parametrize("name", POLICIES)
def test_a_merge_of_zero_length_stays_as_it_is(name: str) -> None:
    assert factor(name, totals([np.zeros(3), np.zeros(3)])) == 1.0


# From here on through files.


@pytest.fixture
def paths(tmp_path: Path, rng: np.random.Generator) -> list[Path]:
    """Three adapters over three modules, alpha three times the rank."""
    found = []
    for name in "abc":
        modules: dict[str, Pair] = {
            module: (rng.standard_normal((RANK, N)), rng.standard_normal((M, RANK)))
            for module in NAMES
        }
        found.append(write_peft(tmp_path / name, modules, lora_alpha=3 * RANK))
    return found


def flat(deltas: dict[str, np.ndarray]) -> np.ndarray:
    """All modules as one vector."""
    return np.concatenate([deltas[name].ravel() for name in NAMES])


def merged(method: str, paths: list[Path], out: Path, **values: object) -> np.ndarray:
    return flat(read_deltas(getattr(loramerge, method)(paths, **values)[0].save(out)))


@pytest.mark.parametrize("method", ["arithmetic", "cluster"])
@pytest.mark.parametrize("scale", ["auto", "norm"])
def test_on_files_one_adapter_comes_back_unchanged(
    paths: list[Path], tmp_path: Path, method: str, scale: str
) -> None:
    once = flat(read_deltas(paths[0]))
    found = merged(method, paths[:1], tmp_path / "out", scale=scale)
    np.testing.assert_allclose(found, once, rtol=0, atol=1e-5 * np.abs(once).max())


@pytest.mark.parametrize("method", ["arithmetic", "cluster"])
def test_on_files_three_copies_come_back_as_one(
    paths: list[Path], tmp_path: Path, method: str
) -> None:
    once = flat(read_deltas(paths[0]))
    found = merged(method, paths[:1] * 3, tmp_path / "out", scale="auto", rank="full")
    np.testing.assert_allclose(found, once, rtol=0, atol=1e-5 * np.abs(once).max())


@pytest.mark.parametrize("method", ["arithmetic", "cluster"])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, -1.0, 2.0]])
def test_on_files_the_length_is_taken_over_the_whole_adapter(
    paths: list[Path], tmp_path: Path, method: str, weights: list[float]
) -> None:
    parts = [w * flat(read_deltas(path)) for w, path in zip(weights, paths, strict=True)]
    mean = np.mean([np.linalg.norm(part) for part in parts])
    total = sum(parts)
    effective = sum(np.linalg.norm(p) for p in parts) ** 2 / np.linalg.norm(total) ** 2
    lengths = {"norm": mean, "auto": mean * min(max(effective, 1), 3) ** 0.42}
    for scale, length in lengths.items():
        found = merged(method, paths, tmp_path / scale, scale=scale, weights=weights, rank="full")
        # float32 factors and Gram matrices
        assert np.linalg.norm(found) == pytest.approx(length, rel=1e-5)
    found = merged(method, paths, tmp_path / "ls", scale="ls", weights=weights, rank="full")
    assert found @ (found - total) == pytest.approx(0, abs=1e-5 * np.linalg.norm(total) ** 2)


def test_on_files_the_length_is_set_before_the_rank_is_cut(
    paths: list[Path], tmp_path: Path
) -> None:
    whole, cut = (
        read_deltas(loramerge.arithmetic(paths, scale="auto", rank=rank)[0].save(tmp_path / name))
        for rank, name in (("full", "whole"), (RANK, "cut"))
    )
    for name in NAMES:
        U, S, Vh = np.linalg.svd(whole[name], full_matrices=False)
        best = (U[:, :RANK] * S[:RANK]) @ Vh[:RANK]
        np.testing.assert_allclose(cut[name], best, rtol=0, atol=1e-5 * S[0])


def test_on_files_a_module_missing_in_one_adapter_counts_as_zero_there(
    paths: list[Path], tmp_path: Path, rng: np.random.Generator
) -> None:
    modules = {"one": (rng.standard_normal((RANK, N)), rng.standard_normal((M, RANK)))}
    part = write_peft(tmp_path / "part", modules, lora_alpha=RANK)
    norms = [np.linalg.norm(flat(read_deltas(paths[0])))]
    norms.append(np.linalg.norm(read_deltas(part)["one"]))
    found = merged("arithmetic", [paths[0], part], tmp_path / "out", scale="norm", rank="full")
    assert np.linalg.norm(found) == pytest.approx(np.mean(norms), rel=1e-5)


def test_on_files_a_number_is_a_factor_beside_lambda(paths: list[Path], tmp_path: Path) -> None:
    total = sum(flat(read_deltas(path)) for path in paths)
    found = merged("arithmetic", paths, tmp_path / "out", scale=0.5, lambda_=-3.0, rank="full")
    np.testing.assert_allclose(found, -1.5 * total, rtol=0, atol=1e-6 * np.abs(total).max())


def test_the_report_states_the_factor_and_what_the_other_policies_would_give(
    paths: list[Path],
) -> None:
    rows = len(NAMES) * M
    parts = [flat(read_deltas(path)) for path in paths]
    weight = 0.09 * rows**0.5 / float(np.linalg.norm(parts[0]))  # between the bounds of size
    weights = [weight] * len(paths)
    _, report = loramerge.arithmetic(paths, weights=weights, scale="norm", rank="full")
    for name in POLICIES:
        wanted = factor(name, totals([weight * part for part in parts], rows=rows))
        assert report.others[name] == pytest.approx(wanted, rel=1e-5)
    assert report.scale == report.others["norm"]
