"""Decorrelate: its formulas written out dense in float64, and its laws."""

from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from loramerge.adapter import LowRank, Role, Updates
from loramerge.algorithms._corrected import Mixed, between
from loramerge.algorithms._inputs import inputs
from loramerge.algorithms.decorrelate import DecorrelateOptions, decorrelate
from loramerge.algorithms.tsv import TsvOptions, tsv
from loramerge.linalg.calibrations import calibrated
from loramerge.linalg.spectrum import Basis, Spectrum, basis
from tests.entries import apart, low_rank
from tests.updates import dense, gaussian, near, weighted_sum

M, N = 60, 50
RANKS = (6, 4, 8)
each_weighting = pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.7, -1.3, 0.4)])


def updates_of(
    factors: list[LowRank],
    weights: tuple[float, ...] = (),
    siblings: tuple[tuple[LowRank, ...], ...] = (),
) -> Updates:
    count = len(factors)
    return Updates(tuple(factors), weights or (1.0,) * count, (1.0,) * count, siblings=siblings)


def merged(updates: Updates, options: DecorrelateOptions | None = None) -> np.ndarray:
    return dense(low_rank(decorrelate(updates, options or DecorrelateOptions(role="query"))))


def three(rng: np.random.Generator) -> tuple[list[LowRank], tuple[tuple[LowRank, ...], ...]]:
    """Three updates that overlap in what they read, and two siblings of each."""
    shared = gaussian(rng, M, N, max(RANKS))
    factors, beside = [], []
    for size, rank in zip((1.0, 3.0, 0.4), RANKS, strict=True):
        own = gaussian(rng, M, N, rank, size)
        factors.append(LowRank(own.A + shared.A[:, :rank], own.B))
        beside.append(tuple(gaussian(rng, out, N, rank) for out in (20, 70)))
    return factors, tuple(beside)


def proxies(updates: Updates) -> list[np.ndarray]:
    """G_t of the docstring, with n x n projections and their eigenvectors."""
    total = [np.zeros((N, N)) for _ in updates.factors]
    rows = list(zip(updates.factors, *zip(*updates.siblings, strict=True), strict=True))
    for member in zip(*(rows or zip(updates.factors, strict=True)), strict=True):
        D = {t: dense(one)[0] for t, one in enumerate(member) if one.rank}
        spans = [
            d.T @ d @ np.linalg.inv(d.T @ d + 9e-4 * np.linalg.norm(d, 2) ** 2 * np.eye(N))
            for d in D.values()
        ]
        values, P = np.linalg.eigh(sum(spans) / len(D))
        way = (values - 1 / len(D)) / max(1 - 1 / len(D), 1e-9)
        Q = np.eye(N) - 0.8 * (P * np.clip(3 * way - 1, 0, 1)) @ P.T if len(D) > 1 else np.eye(N)
        for t, d in D.items():
            total[t] += Q @ d.T @ d @ Q / np.sum((d @ Q) ** 2)
    return [one / np.trace(one) for one in total]


def inverted(H: np.ndarray, ridge: float) -> np.ndarray:
    """(H + l I)^-1 of the docstring."""
    found: np.ndarray = np.linalg.inv(H + ridge * np.trace(H) / len(H) * np.eye(len(H)))
    return found


def regression(W: list[np.ndarray], inputs: list[np.ndarray], ridge: float) -> np.ndarray:
    """W (H + l I)^-1 of the docstring, of unit length."""
    R = sum(w @ G for w, G in zip(W, inputs, strict=True)) @ inverted(sum(inputs), ridge)
    unit: np.ndarray = R / np.linalg.norm(R)
    return unit


# Of the docstring: how much is the sum of tsv, how far that is set right, and the other sides.
PARTS = {
    "query": (0.5, 1.0, True),
    "value": (0.0, 0.0, False),
    "output": (0.0, 0.0, True),
    "down": (0.5, 0.0, False),
    "other": (1.0, 0.5, False),
}


def written_out(updates: Updates, ridge: float, flatten: float, role: str) -> np.ndarray:
    """The docstring, line by line, with n x n matrices and a full SVD."""
    near, right, both = PARTS[role]
    D = [dense(f)[0] for f in updates.factors]
    W = [w * d for w, d in zip(updates.weights, D, strict=True)]
    G = proxies(updates)
    R = regression(W, G, ridge)
    if both:
        outputs = [d @ d.T / np.sum(d**2) for d in D]
        R = R + regression([w.T for w in W], outputs, ridge).T
    S, norms = sum(W), [np.linalg.norm(w) for w in W]
    T, length = len(D), np.linalg.norm(S)
    effective = min(max(sum(norms) ** 2 / length**2, 1), T)
    d = (1 - 1 / effective) / (1 - 1 / T)
    U, s, Vh = np.linalg.svd(d * R / np.linalg.norm(R) + (1 - d) * S / length)
    leading = round(np.mean([f.rank for f in updates.factors]))
    lift = np.maximum(s / s[0], 1e-2) ** ((1 - 1 / effective) * (flatten - 1))
    lift[leading:] = lift[leading - 1]
    s = s * lift
    s *= min(length, sum(norms) ** 2 / T / length) / np.linalg.norm(s[:leading])
    anew = (U[:, : len(s)] * s) @ Vh[: len(s)]
    crowd = min((effective - 1) / 4, 1)
    start = dense(low_rank(tsv(updates, TsvOptions())))[0]
    missing = sum((w - start) @ g for w, g in zip(W, G, strict=True))
    start = start + right * crowd * missing @ inverted(sum(G), ridge)
    share = 1 - (1 - near) * crowd
    return share * start + (1 - share) * anew


@each_weighting
@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("role", PARTS)
def test_thin_factors_give_what_the_formulas_give_in_full(
    rng: np.random.Generator, weights: tuple[float, ...], beside: bool, role: Role
) -> None:
    factors, others = three(rng)
    updates = updates_of(factors, weights, others if beside else ())
    wanted = written_out(updates, 0.3, 0.5, role)[None]
    found = merged(updates, DecorrelateOptions(ridge=0.3, flatten=0.5, role=role))
    assert apart(found, wanted) < 1e-5  # the factors are float32
    told = replace(updates, role=role)
    assert apart(merged(told, DecorrelateOptions(ridge=0.3)), wanted) < 1e-5


@each_weighting
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("role", PARTS)
def test_it_knows_its_length_and_how_much_of_the_sum_it_is(
    rng: np.random.Generator, weights: tuple[float, ...], alike: bool, role: Role
) -> None:
    factors, _ = three(rng)
    if alike:  # no Gram matrix alone gives a basis of these
        factors[2] = near(rng, factors[0], 1e-5)
    updates = updates_of(factors, weights)
    found = decorrelate(updates, DecorrelateOptions(role=role))
    result, target = dense(low_rank(found)), weighted_sum(factors, weights)
    assert found.whole is not None
    np.testing.assert_allclose(found.whole[0], [np.sum(result**2)], rtol=1e-5)
    size = np.linalg.norm(result) * np.linalg.norm(target)
    np.testing.assert_allclose(found.whole[1], [np.sum(result * target)], atol=1e-5 * size)


def test_a_mix_of_two_bases_is_the_mix_of_what_stands_in_them(rng: np.random.Generator) -> None:
    X, rows = rng.standard_normal((1, M, 5)), rng.standard_normal((1, 7, N))
    own = basis(X)
    turn = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    turned = Basis(X, own.mix @ turn, turn.T @ own.coefficients, own=True)
    other = Basis(X @ turned.mix, np.eye(5)[None], turned.coefficients)  # the same, lifted
    Z = rng.standard_normal((2, 1, 5, 7))
    near_ = Mixed(own, Z[0], Z[0], rows, rows @ rows.mT)
    wanted = 0.3 * X @ own.mix @ Z[0] @ rows + 0.7 * X @ turned.mix @ Z[1] @ rows
    for left in (turned, other):
        found = between(near_, near_._replace(left=left, Z=Z[1]), np.array([0.3]))
        np.testing.assert_allclose(X @ found.left.mix @ found.Z @ rows, wanted, atol=1e-10)


def test_calibrated_it_knows_its_length_no_more(rng: np.random.Generator) -> None:
    updates = updates_of(three(rng)[0])
    found = decorrelate(updates, DecorrelateOptions())
    later = calibrated("svc", updates, found)
    assert isinstance(later, Spectrum)
    assert apart(dense(low_rank(later)), dense(low_rank(found))) > 1e-2
    assert later.whole is None


def test_from_five_updates_on_a_result_has_its_whole_part_of_tsv(rng: np.random.Generator) -> None:
    updates = updates_of([gaussian(rng, M, N, 2) for _ in range(6)])
    assert apart(merged(updates), written_out(updates, 0.2, 0.5, "query")[None]) < 1e-5


@pytest.mark.parametrize("role", PARTS)
def test_modules_of_one_batch_do_not_touch_each_other(rng: np.random.Generator, role: Role) -> None:
    apart_, alike = three(rng)[0], [gaussian(rng, M, N, rank) for rank in RANKS]
    alike[1] = LowRank(alike[0].A[:, :4], alike[1].B)  # rows that are there twice
    options = DecorrelateOptions(role=role)
    both = [
        LowRank(np.concatenate([x.A, y.A]), np.concatenate([x.B, y.B]))
        for x, y in zip(apart_, alike, strict=True)
    ]
    found = merged(updates_of(both), options)
    for place, factors in enumerate((apart_, alike)):
        alone = merged(updates_of(factors), options)
        assert apart(found[[place]], alone) < 1e-5  # float32 factors


def test_what_was_read_for_one_module_serves_those_beside_it(rng: np.random.Generator) -> None:
    factors, others = three(rng)
    families = [factors, *([row[place] for row in others] for place in range(2))]
    shared: dict[Any, Any] = {}
    for place, own in enumerate(families):
        rest = families[:place] + families[place + 1 :]
        beside = tuple(zip(*rest, strict=True))
        alone = merged(updates_of(own, siblings=beside))
        told = replace(updates_of(own, siblings=beside), place=place, shared=shared)
        assert apart(merged(told), alone) < 1e-5  # float32 factors
    assert sum(key[0] == "inputs" for key in shared) == 1  # as all three read the same


def test_with_an_endless_ridge_it_is_tsv(rng: np.random.Generator) -> None:
    updates = updates_of(three(rng)[0])
    found = merged(updates, DecorrelateOptions(ridge=1e9, role="other"))
    assert apart(found, dense(low_rank(tsv(updates, TsvOptions())))) < 1e-6


def test_what_all_started_from_says_little_of_inputs(rng: np.random.Generator) -> None:
    start = gaussian(rng, M, N, 6).A
    learned = [gaussian(rng, M, N, 6, 0.3) for _ in range(3)]
    updates = updates_of([LowRank(start + one.A, one.B) for one in learned])
    read, *_ = inputs(updates, 0.2)
    for t, (update, one) in enumerate(zip(updates.factors, learned, strict=True)):
        axes = np.linalg.qr(one.A[0].T)[0]
        found = (read.mix @ read.rows)[0, read.owners[:, t] > 0]
        plain = dense(update)[0]
        assert np.linalg.norm(found) == pytest.approx(1)
        share = np.linalg.norm(found @ axes), np.linalg.norm(plain @ axes) / np.linalg.norm(plain)
        assert share[0] > 1.25 * share[1]  # 1.3 measured, 1 where nothing is made less


def test_one_adapter_and_copies_of_it_come_back_unchanged(rng: np.random.Generator) -> None:
    update, other = gaussian(rng, M, N, 6), gaussian(rng, M, N, 6)
    for count in (1, 2, 5):
        updates = updates_of([update] * count, siblings=((other,),) * count)
        assert apart(merged(updates), dense(update)) < 1e-5  # the factors are float32


@pytest.mark.parametrize("copies", [True, False])
def test_a_small_change_of_the_inputs_is_a_small_change_of_the_result(
    rng: np.random.Generator, copies: bool
) -> None:
    factors = [gaussian(rng, M, N, 6)] * 3 if copies else three(rng)[0]
    changed = [near(rng, factor, 1e-3) for factor in factors]
    gap = apart(merged(updates_of(changed)), merged(updates_of(factors)))
    assert gap < 1e-2  # the law of all spectral methods: ten times the change


@pytest.mark.parametrize("role", PARTS)
def test_of_many_updates_with_one_a_a_small_change_is_no_small_change(
    rng: np.random.Generator, role: Role
) -> None:
    A = gaussian(rng, M, N, 6).A
    factors = [LowRank(A, gaussian(rng, M, N, 6).B) for _ in range(6)]
    changed = [near(rng, factor, 1e-3) for factor in factors]
    options = DecorrelateOptions(role=role)
    gap = apart(merged(updates_of(changed), options), merged(updates_of(factors), options))
    # outside the law: all read the same, so that the change is all there is to tell them by
    assert 1e-2 < gap < 1e-1


def test_an_update_taken_from_itself_leaves_nothing(rng: np.random.Generator) -> None:
    update = gaussian(rng, M, N, 6)
    left = merged(updates_of([update, update], (1.0, -1.0)))
    assert np.linalg.norm(left) < 1e-5 * np.linalg.norm(dense(update))


@pytest.mark.parametrize("role", PARTS)
def test_near_copies_of_opposite_weight_leave_a_few_times_their_difference(
    rng: np.random.Generator, role: Role
) -> None:
    update = gaussian(rng, M, N, 6)
    other = near(rng, update, 1e-2)
    difference = np.linalg.norm(dense(update) - dense(other))
    left = merged(updates_of([update, other], (1.0, -1.0)), DecorrelateOptions(role=role))
    assert np.linalg.norm(left) < 10 * difference  # the law of small changes


def test_what_an_update_alone_reads_is_answered_as_it_answers(rng: np.random.Generator) -> None:
    factors = [
        LowRank(np.eye(4, N, start, dtype=np.float32)[None], gaussian(rng, M, N, 4).B)
        for start in range(0, 24, 4)
    ]
    W = merged(updates_of(factors), DecorrelateOptions(ridge=1e-6, flatten=1.0, role="value"))
    total = sum(dense(one) for one in factors)
    # at right angles the regression is the sum but for its length, less what the ridge takes
    assert apart(W / np.linalg.norm(W), total / np.linalg.norm(total)) < 1e-3
