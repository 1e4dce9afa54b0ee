"""Sums, norms, inner products and errors from factors, against float64 dense NumPy."""

import numpy as np
import pytest
from msgspec.structs import replace

from loramerge.adapter import LowRank, Updates
from loramerge.linalg.factors import compare, concat, grams, norm, pad, scale, summed
from loramerge.linalg.spectrum import decompose
from tests.updates import CASES, Case, M, N, dense, gaussian, near, weighted_sum

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def squared(x: np.ndarray) -> float:
    """||x||_F^2 of the only matrix in a batch."""
    return float(np.sum(x[0] ** 2))


def lengths(case: Case) -> float:
    """The norms of a sum's terms, added up: what rounding is relative to."""
    return sum(abs(w) * float(np.linalg.norm(dense(u))) for u, w in zip(*case, strict=True))


@each_case
def test_concatenation_is_the_weighted_sum(case: Case) -> None:
    total = weighted_sum(*case)
    # Weighting B rounds each entry once, to 6e-8 of the term it belongs to.
    assert np.linalg.norm(dense(concat(*case)) - total) <= 1e-7 * lengths(case)


def test_concatenation_with_weights_that_are_powers_of_two_is_exact(
    rng: np.random.Generator,
) -> None:
    updates = [gaussian(rng, 12, 10, r) for r in (3, 2, 4)]
    weights = [1.0, -0.5, 4.0]
    total = concat(updates, weights)
    assert np.array_equal(total.A[0], np.concatenate([u.A[0] for u in updates]))
    assert np.array_equal(
        total.B[0],
        np.concatenate([w * u.B[0] for u, w in zip(updates, weights, strict=True)], 1),
    )


def test_concatenation_stacks_unequal_ranks_in_order(rng: np.random.Generator) -> None:
    total = concat([gaussian(rng, 12, 10, r) for r in (3, 2, 4)], [1, 1, 1])
    assert total.rank == 9
    assert total.A.dtype == total.B.dtype == np.float32


def test_the_weighted_sum_of_updates_is_concatenated_once(rng: np.random.Generator) -> None:
    factors = tuple(gaussian(rng, 12, 10, r) for r in (3, 2))
    updates = Updates(factors, (1.0, -0.7), (1.0, 1.0))
    whole, known = summed(updates)
    wanted = concat(factors, updates.weights)
    assert np.array_equal(whole.B, wanted.B)
    assert np.array_equal(known.A, grams(wanted).A)
    assert summed(replace(updates, rank=2))[0] is whole
    other = replace(updates, weights=(1.0, 2.0))
    assert np.array_equal(summed(other)[0].B, concat(factors, (1.0, 2.0)).B)
    other = replace(updates, factors=factors[::-1])
    assert np.array_equal(summed(other)[0].B, concat(factors[::-1], updates.weights).B)


@each_case
def test_the_norm_is_good_to_1e_5_or_1e_2_where_terms_cancel(case: Case) -> None:
    total = np.sqrt(squared(dense(concat(*case))))
    tolerance = 1e-5 if lengths(case) <= 50 * total else 1e-2
    assert norm(concat(*case))[0] == pytest.approx(total, rel=tolerance)


@pytest.mark.parametrize("share", [1e-1, 1e-2, 1e-3, 1e-4, 1e-6])
def test_the_norm_of_an_update_whose_terms_cancel_is_good_to_1e_2(
    rng: np.random.Generator, share: float
) -> None:
    a = gaussian(rng, M, N, 8)
    difference = concat([a, near(rng, a, share)], [1.0, -1.0])
    true = np.linalg.norm(dense(difference))
    assert norm(difference)[0] == pytest.approx(true, rel=1e-2)


def test_the_norm_of_a_batch_is_one_number_for_each_module(rng: np.random.Generator) -> None:
    update = gaussian(rng, 12, 10, 3, batch=4)
    expected = np.linalg.norm(dense(update), axis=(-2, -1))
    np.testing.assert_allclose(norm(update), expected, rtol=1e-6)


@each_case
def test_target_result_and_inner_product_are_good_to_1e_5(case: Case) -> None:
    target = concat(*case)
    result = decompose(target).truncated(max(1, target.rank // 2))
    found = compare(target, result)
    t, r = dense(target), dense(result)
    # The inner product may vanish; its scale is that of Cauchy and Schwarz.
    scale = np.sqrt(squared(t) * squared(r))
    assert found.target[0] == pytest.approx(squared(t), rel=1e-5)
    assert found.result[0] == pytest.approx(squared(r), rel=1e-5)
    assert found.inner[0] == pytest.approx(float(np.sum(t[0] * r[0])), abs=1e-5 * scale)


@each_case
def test_the_error_of_a_truncation_is_good_to_1e_2(case: Case) -> None:
    target = concat(*case)
    for rank in (1, 4, 8):
        result = decompose(target).truncated(rank)
        result = LowRank(result.A.astype(np.float32), result.B.astype(np.float32))
        found = np.sqrt(compare(target, result).error[0])
        true = np.sqrt(squared(dense(target) - dense(result)))
        # Below 1e-12 of the terms nothing is left to measure in float64.
        assert found == pytest.approx(true, rel=1e-2, abs=1e-12 * lengths(case))


@pytest.mark.parametrize("share", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7])
def test_a_small_error_is_measured_to_1e_2_of_itself(
    rng: np.random.Generator, share: float
) -> None:
    target = gaussian(rng, M, N, 8)
    noise = gaussian(rng, M, N, 8, share)
    result = concat([target, noise], [1.0, 1.0])
    true = np.linalg.norm(dense(target) - dense(result))
    assert np.sqrt(compare(target, result).error[0]) == pytest.approx(true, rel=1e-2)


@pytest.mark.parametrize("share", [1e-1, 1e-3, 1e-5])
def test_an_error_spread_over_all_entries_of_the_factors_is_measured_too(
    rng: np.random.Generator, share: float
) -> None:
    target = gaussian(rng, M, N, 8)
    result = near(rng, target, share)
    true = np.linalg.norm(dense(target) - dense(result))
    assert np.sqrt(compare(target, result).error[0]) == pytest.approx(true, rel=1e-2)


def test_an_update_is_no_distance_from_itself(rng: np.random.Generator) -> None:
    update = gaussian(rng, M, N, 8)
    found = compare(update, update)
    # float64 rounding of a QR factorisation
    assert np.sqrt(found.error[0] / found.target[0]) <= 1e-14
    assert found.inner[0] == pytest.approx(found.target[0], rel=1e-12)


def test_another_factorisation_of_the_same_update_is_as_near_as_float32_can_tell(
    rng: np.random.Generator,
) -> None:
    update = gaussian(rng, M, N, 8)
    other = decompose(update).truncated(8)
    found = compare(update, other)
    true = np.linalg.norm(dense(update) - dense(other))
    assert np.sqrt(found.error[0]) == pytest.approx(true, rel=1e-2)


def test_against_a_zero_update_the_error_is_the_whole(rng: np.random.Generator) -> None:
    update = gaussian(rng, M, N, 8)
    zero = LowRank(update.A, update.B * np.float32(0))
    found = compare(update, zero)
    assert found.result[0] == found.inner[0] == 0
    assert found.error[0] == found.target[0]
    assert compare(zero, update).error[0] == pytest.approx(found.target[0], rel=1e-6)
    assert compare(zero, zero).error[0] == 0


def test_the_polarization_identity_holds(rng: np.random.Generator) -> None:
    found = compare(gaussian(rng, M, N, 8), gaussian(rng, M, N, 4))
    rest = found.target + found.result - 2 * found.inner
    # float32 Gram matrices
    np.testing.assert_allclose(found.error, rest, rtol=1e-6)


def test_each_module_of_a_batch_is_compared_on_its_own(rng: np.random.Generator) -> None:
    target, result = gaussian(rng, 30, 20, 4, batch=3), gaussian(rng, 30, 20, 2, batch=3)
    expected = np.sum((dense(target) - dense(result)) ** 2, axis=(-2, -1))
    np.testing.assert_allclose(compare(target, result).error, expected, rtol=1e-5)


def test_each_module_of_a_float32_batch_is_measured_as_it_is_alone(
    rng: np.random.Generator,
) -> None:
    target = gaussian(rng, 30, 20, 4, batch=2)
    result = LowRank(target.A, target.B.copy())
    result.B[0] += rng.standard_normal((30, 4)).astype(np.float32)
    result.B[1] *= np.float32(1 + 1e-5)  # too near for float32
    together = compare(target, result)
    for item in range(2):
        one = slice(item, item + 1)
        alone = compare(
            LowRank(target.A[one], target.B[one]), LowRank(result.A[one], result.B[one])
        )
        assert together.error[item] == alone.error[0]


def test_each_module_of_a_batch_is_measured_as_it_is_alone(rng: np.random.Generator) -> None:
    # Far apart, too near for float32, too near for float64, and the same to the bit.
    target = gaussian(rng, 30, 20, 4, batch=4)
    result = LowRank(target.A.astype(np.float64), target.B.astype(np.float64))
    result.B[0] += rng.standard_normal((30, 4))
    result.B[1] *= 1 + 1e-5
    result.B[2] *= 1 + 1e-12
    target = LowRank(target.A.astype(np.float64), target.B.astype(np.float64))
    together = compare(target, result)
    for item in range(4):
        one = slice(item, item + 1)
        alone = compare(
            LowRank(target.A[one], target.B[one]), LowRank(result.A[one], result.B[one])
        )
        for name in ("target", "result", "inner", "error"):
            assert getattr(together, name)[item] == getattr(alone, name)[0]
    np.testing.assert_allclose(
        together.error[1:] / together.target[1:], [1e-10, 1e-24, 0], rtol=0.1
    )


def test_padding_adds_zero_ranks_and_nothing_else(rng: np.random.Generator) -> None:
    update = gaussian(rng, 12, 10, 3)
    padded = pad(update, 5)
    assert (padded.A.shape, padded.B.shape) == ((1, 5, 10), (1, 12, 5))
    assert np.array_equal(dense(padded), dense(update))
    assert pad(update, 3) is update
    assert pad(update, 2) is update


def test_scaling_by_one_copies_nothing(rng: np.random.Generator) -> None:
    update = gaussian(rng, 12, 10, 3)
    assert scale(update, 1) is update
    np.testing.assert_array_equal(scale(update, -0.5).B, -0.5 * update.B)
