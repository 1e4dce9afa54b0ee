"""Spaces: coordinates of updates, computed from thin factors, and the way back."""

import numpy as np
import pytest
from msgspec.structs import replace

from loramerge.adapter import LowRank, Updates
from loramerge.algorithms import _spaces
from loramerge.algorithms._options import SparseOptions
from loramerge.algorithms._rules import disjoint_mean, elect_sign, merge_entries
from loramerge.algorithms._spaces import Stack, decode, encode
from tests.backends import BACKENDS, lend_kernels_to_strict
from tests.entries import apart, delta, knots_axes, low_rank, updates, weighted
from tests.updates import CASES, Case, weighted_sum

SPACES = ("knots", "core", "dense")
each_space = pytest.mark.parametrize("space", SPACES)


def added(values: np.ndarray) -> np.ndarray:
    return values.sum(0)


def elected(values: np.ndarray) -> np.ndarray:
    return disjoint_mean(values, elect_sign(values))


def coordinates(stack: Stack, position: int) -> np.ndarray:
    factor = stack.factors[position]
    return factor.B @ factor.A


def of_case(case: Case) -> Updates:
    factors, weights = case
    return Updates(tuple(factors), tuple(weights), (1.0,) * len(factors))


@each_space
@pytest.mark.parametrize("case", CASES)
def test_a_sum_is_the_same_update_in_every_space(case: str, space: str) -> None:
    given = of_case(CASES[case])
    found = delta(merge_entries(given, SparseOptions(), space, added))
    parts = sum(np.linalg.norm(x) for x in weighted(given, 0))
    # float32 products, and axes below 1e-5 of the largest left out, relative to what is added up
    assert np.linalg.norm(found - weighted_sum(*CASES[case])) <= 1e-5 * parts


def test_knots_coordinates_are_those_of_the_svd_of_all_updates_side_by_side(
    rng: np.random.Generator,
) -> None:
    given = updates(rng, weights=(1.0, 0.5, -2.0))
    stack = encode(given, "knots")
    for item in range(2):
        deltas = weighted(given, item)
        U = knots_axes(deltas)
        assert U.shape[1] == stack.rows[item] == 13
        np.testing.assert_allclose(stack.left[item], U, atol=1e-10)
        for t, x in enumerate(deltas):
            np.testing.assert_allclose(coordinates(stack, t)[item], U.T @ x, atol=1e-10)


def test_core_coordinates_use_the_axes_of_both_sides(rng: np.random.Generator) -> None:
    given = updates(rng, weights=(1.0, 0.5, -2.0))
    stack = encode(given, "core")
    for item in range(2):
        deltas = weighted(given, item)
        U, V = knots_axes(deltas), knots_axes([x.T for x in deltas])
        np.testing.assert_allclose(stack.right[item], V.T, atol=1e-10)
        for t, x in enumerate(deltas):
            np.testing.assert_allclose(coordinates(stack, t)[item], U.T @ x @ V, atol=1e-10)


@each_space
def test_how_a_file_factors_its_update_decides_no_coordinate(
    rng: np.random.Generator, space: str
) -> None:
    given = updates(rng)
    changed = []
    for f in given.factors:
        G = np.eye(f.rank) + 0.3 * rng.standard_normal((f.rank, f.rank))
        changed.append(LowRank(np.linalg.inv(G) @ f.A, f.B @ G))
    before = encode(given, space)
    after = encode(replace(given, factors=tuple(changed)), space)
    for t in range(3):
        np.testing.assert_allclose(coordinates(after, t), coordinates(before, t), atol=1e-8)


def test_axes_are_as_good_in_float32_files(rng: np.random.Generator) -> None:
    given = updates(rng, m=300, n=200, dtype=np.float32)
    stack = encode(given, "knots")
    U = knots_axes(weighted(given, 0))
    # what the files hold is taken in float64; only the coordinates are float32 again
    np.testing.assert_allclose(stack.left[0], U, atol=1e-9)


@pytest.mark.parametrize("space", ["knots", "core"])
def test_the_signs_of_axes_do_not_matter(rng: np.random.Generator, space: str) -> None:
    given = updates(rng)
    stack = encode(given, space)
    flip = np.where(rng.random(stack.left.shape[-1]) < 0.5, -1.0, 1.0)
    flop = np.ones(stack.shape[-1])
    if stack.right is not None:
        flop = np.where(rng.random(flop.size) < 0.5, -1.0, 1.0)
    turned = replace(
        stack,
        factors=tuple(LowRank(f.A * flop, f.B * flip[:, None]) for f in stack.factors),
        left=stack.left * flip,
        right=None if stack.right is None else stack.right * flop[:, None],
    )
    results = [
        delta(decode(s, elected(np.stack([coordinates(s, t) for t in range(3)])), given))
        for s in (stack, turned)
    ]
    assert apart(*results) < 1e-12


def test_axes_are_cut_where_the_updates_end(rng: np.random.Generator) -> None:
    given = updates(rng, ranks=(4, 4))
    copies = replace(given, factors=(given.factors[0],) * 2)
    faint = LowRank(given.factors[1].A, given.factors[1].B * 1e-7)
    with_faint = replace(given, factors=(given.factors[0], faint))
    for cut in (copies, with_faint):
        stack = encode(cut, "core")
        assert stack.rows.tolist() == stack.columns.tolist() == [4, 4]
        assert not stack.left[..., 4:].any()
        assert not stack.right[..., 4:, :].any()


def test_a_batch_of_unequal_numerical_ranks_is_what_its_items_are(
    rng: np.random.Generator,
) -> None:
    given = updates(rng)
    first, second = (LowRank(f.A.copy(), f.B.copy()) for f in given.factors[:2])
    second.A[0], second.B[0] = 0, 0
    mixed = replace(given, factors=(first, second, given.factors[2]))
    for space in ("knots", "core"):
        options = SparseOptions(space=space, sparsify="della")
        together = delta(merge_entries(mixed, options, options.space, elected))
        for item in range(2):
            factors = tuple(
                LowRank(f.A[item : item + 1], f.B[item : item + 1]) for f in mixed.factors
            )
            keys = tuple((key[item],) for key in mixed.keys)
            alone = delta(
                merge_entries(
                    replace(mixed, factors=factors, keys=keys), options, options.space, elected
                )
            )
            assert apart(together[item : item + 1], alone) < 1e-12


@each_space
@pytest.mark.parametrize("sparsify", ["none", "magnitude", "dare", "della", "breadcrumbs"])
def test_tiles_never_change_a_bit(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, space: str, sparsify: str
) -> None:
    given = replace(updates(rng, m=250, n=70, ranks=(30, 30), dtype=np.float32), rank=8)
    options = SparseOptions(space=space, sparsify=sparsify)
    results = []
    for entries in (2**30, 1, 100 * 2 * 2 * 70):
        monkeypatch.setattr(_spaces, "CPU_TILE", entries)
        results.append(low_rank(merge_entries(given, options, options.space, elected)))
    assert len(list(encode(given, "dense").tiles())) > 1
    for other in results[1:]:
        assert other.A.tobytes() == results[0].A.tobytes()
        assert other.B.tobytes() == results[0].B.tobytes()


@each_space
@pytest.mark.parametrize("sparsify", ["none", "magnitude", "dare", "della", "breadcrumbs"])
def test_a_batch_never_changes_a_bit(rng: np.random.Generator, space: str, sparsify: str) -> None:
    given = replace(updates(rng, batch=3, dtype=np.float32), rank=8)
    options = SparseOptions(space=space, sparsify=sparsify)
    together = low_rank(merge_entries(given, options, options.space, elected))
    for item in range(3):
        factors = tuple(LowRank(f.A[item : item + 1], f.B[item : item + 1]) for f in given.factors)
        keys = tuple((key[item],) for key in given.keys)
        own = replace(given, factors=factors, keys=keys)
        alone = low_rank(merge_entries(own, options, options.space, elected))
        assert alone.A[0].tobytes() == together.A[item].tobytes()
        assert alone.B[0].tobytes() == together.B[item].tobytes()


@each_space
def test_a_weight_is_a_longer_update(rng: np.random.Generator, space: str) -> None:
    given = updates(rng, weights=(1.0, 0.25, -4.0))
    longer = tuple(LowRank(f.A, f.B * w) for f, w in zip(given.factors, given.weights, strict=True))
    options = SparseOptions(space=space, sparsify="magnitude")
    by_weight = delta(merge_entries(given, options, options.space, elected))
    by_length = delta(
        merge_entries(
            replace(given, factors=longer, weights=(1.0,) * 3), options, options.space, elected
        )
    )
    np.testing.assert_array_equal(by_weight, by_length)


@each_space
def test_a_weight_of_zero_leaves_an_adapter_out(rng: np.random.Generator, space: str) -> None:
    given = updates(rng, weights=(1.0, 0.0, 2.0))
    without = replace(
        given,
        factors=(given.factors[0], given.factors[2]),
        weights=(1.0, 2.0),
        keys=(given.keys[0], given.keys[2]),
    )
    options = SparseOptions(space=space, sparsify="magnitude")
    found, wanted = (
        delta(merge_entries(g, options, options.space, elected)) for g in (given, without)
    )
    assert apart(found, wanted) < 1e-12


def test_a_dense_result_knows_the_whole_though_it_is_cut(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loramerge.linalg import dense

    monkeypatch.setattr(dense, "SMALL", 50)
    given = replace(updates(rng, m=400, n=300, weights=(1.0, -0.5, 2.0)), rank=4)
    options = SparseOptions(space="dense", sparsify="magnitude")
    found = merge_entries(given, options, options.space, elected)
    assert found.s.shape[-1] < 300
    whole = delta(merge_entries(replace(given, rank=None), options, options.space, elected))
    target = np.stack([sum(weighted(given, item)) for item in range(2)])
    length, inner = found.whole
    np.testing.assert_allclose(length, (whole**2).sum((-2, -1)), rtol=1e-9)
    np.testing.assert_allclose(inner, (whole * target).sum((-2, -1)), rtol=1e-9)
    longer = found.scaled(-3.0)
    np.testing.assert_allclose(longer.whole[0], 9 * length)
    np.testing.assert_allclose(longer.whole[1], -3 * inner)


@each_space
@pytest.mark.parametrize("backend", ["torch", "strict"])
def test_every_kind_of_array_is_taken(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, space: str, backend: str
) -> None:
    lend_kernels_to_strict(monkeypatch)
    used = BACKENDS[backend]
    given = updates(rng)
    put = replace(given, factors=tuple(used.update(f) for f in given.factors))
    stack, wanted = encode(put, space), encode(given, space)
    for rows in wanted.tiles():
        found = used.take(stack.tile(1, rows))
        np.testing.assert_allclose(found, wanted.tile(1, rows), atol=1e-10)
