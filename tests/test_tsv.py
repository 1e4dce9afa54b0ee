"""TSV-M against the paper written out, densely and in float64, and where it must differ."""

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

import loramerge
from loramerge.adapter import LowRank, Updates
from loramerge.algorithms.tsv import TsvOptions, tsv
from tests.build import write_peft
from tests.conftest import factors
from tests.entries import apart, delta, updates, weighted
from tests.updates import gaussian, near

Matrix = np.ndarray


def svd(dW: Matrix, rank: int) -> tuple[Matrix, Matrix, Matrix]:
    U, s, Vh = np.linalg.svd(dW, full_matrices=False)
    return U[:, :rank], s[:rank], Vh[:rank].T


def whitened(X: Matrix) -> Matrix:
    """P Q^T of X = P D Q^T (arXiv:2412.00081, algorithm 1)."""
    P, _, Qh = np.linalg.svd(X, full_matrices=False)
    return P @ Qh


def published(deltas: list[Matrix], ranks: list[int], smooth: str = "none") -> Matrix:
    """TSV-M on m x n matrices, k_t singular triples of each."""
    parts = [svd(dW, k) for dW, k in zip(deltas, ranks, strict=True)]
    U = whitened(np.concatenate([part[0] for part in parts], axis=1))
    V = whitened(np.concatenate([part[2] for part in parts], axis=1))
    return U @ np.diag(np.concatenate([smoothed(s, smooth) for _, s, _ in parts])) @ V.T


def smoothed(s: Matrix, how: str) -> Matrix:
    """DC-Merge's spectra (arXiv:2603.06242): the sum stays."""
    if how == "average":
        return np.full_like(s, s.mean())
    if how == "linear":
        ramp = np.linspace(min(5.0, s[0] / s[-1]), 1.0, len(s))
        return ramp * s.sum() / ramp.sum()
    return s


def orthogonal(rng: np.random.Generator, m: int, n: int, ranks: list[int]) -> Updates:
    """Updates whose columns, and whose rows, are at right angles to those of all others."""
    Q = np.linalg.qr(rng.standard_normal((m, sum(ranks))))[0]
    P = np.linalg.qr(rng.standard_normal((n, sum(ranks))))[0]
    found, start = [], 0
    for rank in ranks:
        own = slice(start, start := start + rank)
        A = rng.standard_normal((rank, rank)) @ P[:, own].T
        found.append(LowRank(A[None], (Q[:, own] @ rng.standard_normal((rank, rank)))[None]))
    return Updates(tuple(found), (1.0,) * len(ranks), (1.0,) * len(ranks))


def alike(*given: LowRank, weights: tuple[float, ...] | None = None) -> Updates:
    count = len(given)
    return Updates(given, weights or (1.0,) * count, (1.0,) * count)


@pytest.mark.parametrize("smooth", ["none", "average", "linear"])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 0.5, -0.8)])
def test_tsv_is_tsv_m_in_full_space(
    rng: np.random.Generator, smooth: str, weights: tuple[float, ...]
) -> None:
    given = updates(rng, m=90, n=80, weights=weights)
    found = delta(tsv(given, TsvOptions(smooth=smooth)))
    for item in range(2):
        wanted = published(weighted(given, item), [4, 6, 3], smooth)
        assert apart(found[item], wanted) < 1e-9


def test_float32_files_give_what_float64_gives(rng: np.random.Generator) -> None:
    given = updates(rng, m=90, n=80, dtype=np.float32)
    double = replace(
        given, factors=tuple(LowRank(f.A.astype(float), f.B.astype(float)) for f in given.factors)
    )
    assert apart(delta(tsv(given, TsvOptions())), delta(tsv(double, TsvOptions()))) < 1e-5


def test_orthogonal_updates_are_added_up(rng: np.random.Generator) -> None:
    given = orthogonal(rng, 60, 50, [4, 6, 3])
    deltas = weighted(given, 0)
    found = delta(tsv(given, TsvOptions()))[0]
    assert apart(found, published(deltas, [4, 6, 3])) < 1e-6
    assert apart(found, np.sum(deltas, axis=0)) < 1e-6


def test_one_adapter_alone_comes_back(rng: np.random.Generator) -> None:
    given = updates(rng, ranks=(5,), weights=(-0.7,))
    wanted = np.stack([weighted(given, item)[0] for item in range(2)])
    assert apart(delta(tsv(given, TsvOptions())), wanted) < 1e-9


@pytest.mark.parametrize("count", [2, 4])
def test_copies_of_one_adapter_come_back_as_that_adapter(
    rng: np.random.Generator, count: int
) -> None:
    one = gaussian(rng, 60, 50, 6)
    found = delta(tsv(alike(*[one] * count), TsvOptions()))
    assert apart(found, weighted(alike(one), 0)[0][None]) < 1e-5  # float32


def test_copies_count_by_their_mean_weight(rng: np.random.Generator) -> None:
    one = gaussian(rng, 60, 50, 6)
    found = delta(tsv(alike(one, one, weights=(2.0, -0.5)), TsvOptions()))
    assert apart(found, 0.75 * weighted(alike(one), 0)[0][None]) < 1e-5  # float32


def test_copies_take_the_room_of_one(rng: np.random.Generator) -> None:
    one = gaussian(rng, 20, 16, 12)
    found = delta(tsv(alike(one, one, one), TsvOptions()))
    assert apart(found, weighted(alike(one), 0)[0][None]) < 1e-5  # float32


def test_the_published_form_leaps_where_updates_coincide_and_ours_does_not(
    rng: np.random.Generator,
) -> None:
    one = gaussian(rng, 60, 50, 6)
    exact = alike(*[one] * 4)
    moved = alike(*[near(rng, one, 1e-6) for _ in range(4)])
    leap = apart(published(weighted(moved, 0), [6] * 4), published(weighted(exact, 0), [6] * 4))
    assert leap > 1
    assert apart(delta(tsv(moved, TsvOptions())), delta(tsv(exact, TsvOptions()))) < 1e-5


def test_two_checkpoints_of_one_run_keep_the_length_of_one(rng: np.random.Generator) -> None:
    one = gaussian(rng, 60, 50, 6)
    given = alike(one, near(rng, one, 0.05))
    deltas = weighted(given, 0)
    length = np.linalg.norm(delta(tsv(given, TsvOptions()))[0]) / np.linalg.norm(deltas[0])
    assert 0.97 < length < 1.03
    assert np.linalg.norm(published(deltas, [6, 6])) > 1.4 * np.linalg.norm(deltas[0])


def test_where_not_all_ranks_fit_the_largest_singular_values_are_taken(
    rng: np.random.Generator,
) -> None:
    given = updates(rng, m=16, n=14, ranks=(8, 10, 6), batch=1, weights=(1.0, 0.4, 2.0))
    deltas = weighted(given, 0)
    values = [np.linalg.svd(dW, compute_uv=False) for dW in deltas]
    least = np.sort(np.concatenate(values))[-14]
    ranks = [int(np.sum(s >= least)) for s in values]
    assert sum(ranks) == 14
    found = delta(tsv(given, TsvOptions()))[0]
    # Where vectors fill the space some are nearly dependent, and damping shows.
    U = np.concatenate([svd(dW, k)[0] for dW, k in zip(deltas, ranks, strict=True)], axis=1)
    V = np.concatenate([svd(dW, k)[2] for dW, k in zip(deltas, ranks, strict=True)], axis=1)
    s = np.concatenate([svd(dW, k)[1] for dW, k in zip(deltas, ranks, strict=True)])
    assert apart(found, damped(U) @ np.diag(s) @ damped(V).T) < 1e-9


def damped(X: Matrix) -> Matrix:
    """P f(D) Q^T: singular values up to .3 become d / .3, others 1."""
    P, d, Qh = np.linalg.svd(X, full_matrices=False)
    return (P * np.minimum(d / 0.3, 1)) @ Qh


def test_ranks_and_adapters_that_hold_nothing_take_no_part(rng: np.random.Generator) -> None:
    given = updates(rng, m=40, n=30)
    padded = tuple(
        LowRank(
            np.concatenate([f.A, rng.standard_normal(f.A.shape)], axis=-2),
            np.concatenate([f.B, np.zeros_like(f.B)], axis=-1),
        )
        for f in given.factors
    )
    more = replace(
        given,
        factors=(*padded, gaussian(rng, 40, 30, 5, batch=2)),
        weights=(*given.weights, 0.0),
    )
    for smooth in ("none", "average", "linear"):
        options = TsvOptions(smooth=smooth)
        assert apart(delta(tsv(more, options)), delta(tsv(given, options))) < 1e-9


def condition(given: Updates) -> float:
    return float(tsv(given, TsvOptions()).condition[0])


def test_the_condition_is_one_for_orthogonal_updates_and_grows_as_they_near_each_other(
    rng: np.random.Generator,
) -> None:
    assert condition(orthogonal(rng, 60, 50, [4, 6, 3])) == pytest.approx(1)
    one = gaussian(rng, 60, 50, 6)
    other = gaussian(rng, 60, 50, 6)
    assert condition(alike(one, other)) < 10
    assert condition(alike(one, LowRank(one.A, other.B))) < 10  # the same A, and not the same
    # cos = 1 - d^2 / 2 between terms a relative d apart: (2 - d^2 / 2) / (d^2 / 2)
    assert 1e3 < condition(alike(one, near(rng, one, 0.01))) < 1e6
    assert condition(alike(one, one)) > 1e12
    zeros = LowRank(np.concatenate([one.A, one.A], -2), np.concatenate([one.B, 0 * one.B], -1))
    assert condition(alike(zeros)) == pytest.approx(1)


def test_near_copies_are_told_in_the_report(three: list[Path], rng: np.random.Generator) -> None:
    _, apart_ = loramerge.run("tsv", three)
    assert apart_.condition is not None
    assert apart_.condition < 1e3
    assert not any("near copies" in note for note in apart_.notes)
    for settings in ({}, {"scale": "auto"}):  # one pass, and two
        _, report = loramerge.run("tsv", [three[0], three[0], three[1]], **settings)
        assert [note for note in report.notes if note.startswith("3 modules are near copies")]
        facts = report.as_json()
        assert facts["condition"] == max(m["condition"] for m in facts["modules"]) > 1e3
    _, other = loramerge.run("arithmetic", three)
    assert other.as_json()["condition"] is None


def test_copies_keep_their_length_under_every_label_free_scale(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    one = write_peft(tmp_path / "one", factors(rng, 4))
    for scale in ("paper", "auto", "norm"):
        result, _ = loramerge.run("tsv", [one] * 3, scale=scale, save_dtype="float32")
        for name, module in loramerge.load(one).modules.items():
            wanted = loramerge.load(one).read(module.name)
            found = result.adapter.read(name)
            assert apart((found.B @ found.A)[None], (wanted.B @ wanted.A)[None]) < 1e-5  # float32
