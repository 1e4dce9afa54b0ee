"""The thin SVD of a factored sum against float64 dense NumPy."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest

from loramerge.adapter import LowRank
from loramerge.compute import single_threaded_blas
from loramerge.linalg.factors import concat
from loramerge.linalg.spectrum import decompose, randomized
from tests.backends import BACKENDS
from tests.updates import CASES, Case, dense, gaussian, near, weighted_sum

EVERY = 10**6
# Singular values this far apart belong to different groups: each group's part is then determined
# by the input to many more digits than are asked for.
GAP = 10.0

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def truth(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The dense sum of a case and its SVD cut to the numerical rank."""
    total = weighted_sum(*case)[0]
    U, S, Vh = np.linalg.svd(total, full_matrices=False)
    # Dense float64 rounding starts at 1e-16 of the largest value; this far above, it is truth.
    kept = int(np.sum(S / S.max(initial=1e-300) > 1e-9))
    return total, U[:, :kept], S[:kept], Vh[:kept]


@each_case
def test_all_ranks_together_are_the_sum_to_1e_5(case: Case) -> None:
    total = truth(case)[0]
    whole = dense(decompose(concat(*case)).truncated(EVERY))[0]
    assert np.linalg.norm(whole - total) <= 1e-5 * np.linalg.norm(total)


@each_case
def test_each_group_of_components_is_good_to_1e_3_of_itself(case: Case) -> None:
    _, U, S, Vh = truth(case)
    found = decompose(concat(*case)).truncated(EVERY)
    edges = [0, *(np.flatnonzero(S[:-1] > GAP * S[1:]) + 1), len(S)]
    for start, stop in pairwise(edges):
        own = (U[:, start:stop] * S[start:stop]) @ Vh[start:stop]
        part = dense(LowRank(found.A[0, start:stop], found.B[0, :, start:stop]))
        assert np.linalg.norm(part - own) <= 1e-3 * np.linalg.norm(own)


@each_case
def test_each_singular_value_is_good_to_1e_4_of_itself(case: Case) -> None:
    S = truth(case)[2]
    s = decompose(concat(*case)).s[0]
    np.testing.assert_allclose(s[: len(S)], S, rtol=1e-4)
    # What lies below dense rounding is noise of the reference; ours must be no larger than that.
    assert np.all(s[len(S) :] <= 1e-6 * S.max(initial=0.0))


@each_case
def test_singular_values_descend_and_are_not_negative(case: Case) -> None:
    s = decompose(concat(*case)).s
    assert s.dtype == np.float64
    assert np.all(np.diff(s, axis=-1) <= 0)
    assert np.all(s >= 0)


@each_case
def test_the_result_has_no_more_ranks_than_the_matrix_can_have(case: Case) -> None:
    total = concat(*case)
    m, n = total.B.shape[-2], total.A.shape[-1]
    assert decompose(total).s.shape[-1] <= min(m, n, total.rank)


@each_case
def test_truncation_reaches_the_eckart_young_optimum_to_1e_5(case: Case) -> None:
    total, _, S, _ = truth(case)
    spectrum = decompose(concat(*case))
    for rank in range(1, len(S)):
        optimum = np.sqrt(np.sum(S[rank:] ** 2))
        error = np.linalg.norm(dense(spectrum.truncated(rank))[0] - total)
        # Factors are float32: what they round off, 1e-7 of the sum, adds in quadrature.
        rounding = 2e-7 * np.linalg.norm(total)
        assert error <= np.hypot(optimum * (1 + 1e-5), rounding)


def test_ordinary_sums_reach_the_optimum_without_any_allowance_for_rounding() -> None:
    total, _, S, _ = truth(CASES["ordinary"])
    spectrum = decompose(concat(*CASES["ordinary"]))
    for rank in range(1, len(S)):
        error = np.linalg.norm(dense(spectrum.truncated(rank))[0] - total)
        assert error == pytest.approx(np.sqrt(np.sum(S[rank:] ** 2)), rel=1e-5)


@each_case
def test_the_largest_entry_of_each_column_of_b_is_positive(case: Case) -> None:
    B = decompose(concat(*case)).truncated(EVERY).B[0]
    largest = B[np.abs(B).argmax(axis=0), np.arange(B.shape[1])]
    assert np.all(largest >= 0)


@each_case
def test_both_factors_carry_half_of_each_singular_value(case: Case) -> None:
    spectrum = decompose(concat(*case))
    found = spectrum.truncated(EVERY)
    S = truth(case)[2]
    for norms in (np.linalg.norm(found.A[0], axis=1), np.linalg.norm(found.B[0], axis=0)):
        # Orthonormal to float32 in the worst case, and through the Gram road to its pivot.
        np.testing.assert_allclose(norms[: len(S)], S**0.5, rtol=1e-3)


def test_the_same_input_gives_the_same_bytes() -> None:
    for case in CASES.values():
        first, second = (decompose(concat(*case)).truncated(8) for _ in range(2))
        assert first.A.tobytes() == second.A.tobytes()
        assert first.B.tobytes() == second.B.tobytes()


def test_threads_do_not_change_a_byte(rng: np.random.Generator) -> None:
    updates = [gaussian(rng, 300, 200, 32) for _ in range(12)]

    def work(update: LowRank) -> bytes:
        found = decompose(update).truncated(16)
        return found.A.tobytes() + found.B.tobytes()

    with single_threaded_blas(), ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, updates)) == [work(update) for update in updates]


def test_a_batch_with_one_difficult_module_is_accurate_in_every_module(
    rng: np.random.Generator,
) -> None:
    a, b, c = (gaussian(rng, 60, 50, 4) for _ in range(3))
    partner = [b, near(rng, b, 1e-4), LowRank(c.A, c.B * np.float32(0))]
    first = LowRank(*(np.concatenate([getattr(u, x) for u in (a, b, c)]) for x in "AB"))
    second = LowRank(*(np.concatenate([getattr(u, x) for u in partner]) for x in "AB"))
    total = weighted_sum([first, second], [1.0, 1.0])
    found = dense(decompose(concat([first, second], [1.0, 1.0])).truncated(EVERY))
    for module in range(3):
        error = np.linalg.norm(found[module] - total[module])
        assert error <= 1e-5 * np.linalg.norm(total[module])


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_each_module_of_a_batch_takes_the_road_it_takes_alone(
    rng: np.random.Generator, name: str
) -> None:
    # A Cholesky factor, eigenvectors, and QR: columns apart, nearly and almost wholly the same.
    gaps = (1.0, 1e-4, 3e-7)
    pairs = [(one := gaussian(rng, 60, 50, 4), near(rng, one, gap)) for gap in gaps]
    whole = LowRank(
        A=np.concatenate([np.concatenate([u.A for u in pair], axis=-2) for pair in pairs]),
        B=np.concatenate([np.concatenate([u.B for u in pair], axis=-1) for pair in pairs]),
    )
    backend = BACKENDS[name]
    together = backend.back(decompose(backend.update(whole)).truncated(8))
    for item in range(len(gaps)):
        own = LowRank(whole.A[item : item + 1], whole.B[item : item + 1])
        alone = backend.back(decompose(backend.update(own)).truncated(8))
        assert together.A[item].tobytes() == alone.A[0].tobytes()
        assert together.B[item].tobytes() == alone.B[0].tobytes()


@pytest.mark.parametrize("size", [1e-18, 1e-21, 1e-22, 1e-25])
def test_columns_too_small_to_square_in_float32_keep_their_part(
    rng: np.random.Generator, size: float
) -> None:
    a = gaussian(rng, 40, 30, 3)
    # Squares below 1e-38 lose digits, those below 1e-45 are zero.
    tiny = LowRank(a.A * np.float32(size), a.B * np.float32(1e-10))
    found = decompose(tiny)
    error = np.linalg.norm(dense(found.truncated(3)) - dense(tiny))
    assert error <= 1e-5 * np.linalg.norm(dense(tiny))
    np.testing.assert_allclose(found.s[0], np.linalg.svd(dense(tiny)[0])[1][:3], rtol=1e-4)


@pytest.mark.parametrize("factor", [2.5, -0.5])
def test_scaling_a_spectrum_scales_its_update(rng: np.random.Generator, factor: float) -> None:
    update = gaussian(rng, 30, 20, 4)
    scaled = decompose(update).scaled(factor).truncated(4)
    np.testing.assert_allclose(dense(scaled), factor * dense(update), rtol=0, atol=1e-5)


@pytest.mark.parametrize("power", [0, 1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_randomized_svd_is_never_nearer_than_the_exact_one(power: int, seed: int) -> None:
    total = concat(*CASES["ordinary"])
    target = dense(total)
    exact = np.linalg.norm(dense(decompose(total).truncated(4)) - target)
    found = randomized(total, 4, oversample=2, power=power, seed=seed).truncated(4)
    # 1e-7: both are rounded to float32
    assert np.linalg.norm(dense(found) - target) >= exact * (1 - 1e-7)


def test_randomized_svd_comes_near_the_optimum_with_the_settings_of_the_paper(
    rng: np.random.Generator,
) -> None:
    total = gaussian(rng, 120, 90, 40)
    target = dense(total)
    exact = np.linalg.norm(dense(decompose(total).truncated(8)) - target)
    found = randomized(total, 8, oversample=10, power=2, seed=0).truncated(8)
    # Two power steps on a flat Gaussian spectrum, the worst one: a few per cent at most.
    assert np.linalg.norm(dense(found) - target) <= 1.03 * exact


def test_randomized_svd_is_exact_where_the_range_is_whole(rng: np.random.Generator) -> None:
    update = gaussian(rng, 30, 20, 4)
    found = randomized(update, 4, oversample=10, power=0, seed=1).truncated(4)
    np.testing.assert_allclose(dense(found), dense(update), rtol=0, atol=1e-5)


def test_randomized_svd_follows_its_seed(rng: np.random.Generator) -> None:
    update = gaussian(rng, 60, 50, 20)
    one, same, other = (dense(randomized(update, 4, 2, 0, s).truncated(4)) for s in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
