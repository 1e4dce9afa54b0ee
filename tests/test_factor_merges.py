"""LoRA-FAIR and RobustMerge against their formulas written out on svd factors."""

import numpy as np

from loramerge.algorithms.fair import FairOptions, fair
from loramerge.algorithms.robust import RobustOptions, robust
from tests.entries import apart, delta, updates, weighted

Matrix = np.ndarray


def canonical(dW: Matrix, rank: int) -> tuple[Matrix, Matrix]:
    """sqrt(S) V^T and U sqrt(S), the largest entry of each column of B positive, padded to 6."""
    U, s, Vh = np.linalg.svd(dW, full_matrices=False)
    sign = np.where(U.max(0) >= -U.min(0), 1, -1)[:rank]
    A = np.zeros((6, dW.shape[1]))
    B = np.zeros((dW.shape[0], 6))
    A[:rank] = (sign * np.sqrt(s[:rank]))[:, None] * Vh[:rank]
    B[:, :rank] = U[:, :rank] * sign * np.sqrt(s[:rank])
    return A, B


def test_fair_is_the_least_squares_solution_for_the_mean_of_a(rng: np.random.Generator) -> None:
    given = updates(rng, weights=(1.0, 0.5, -0.8))
    found = delta(fair(given, FairOptions()))
    plain = updates(np.random.default_rng(20240916))
    for item in range(2):
        A = np.mean(
            [canonical(d, r)[0] for d, r in zip(weighted(plain, item), (4, 6, 3), strict=True)], 0
        )
        total = np.sum(weighted(given, item), axis=0)
        assert apart(found[item], total @ np.linalg.pinv(A) @ A) < 1e-8


def test_robust_is_its_formula_on_svd_factors(rng: np.random.Generator) -> None:
    given = updates(rng)
    found = delta(robust(given, RobustOptions(density=0.3)))
    for item in range(2):
        A, B, scales = 0.0, 0.0, 0.0
        for dW, rank in zip(weighted(given, item), (4, 6, 3), strict=True):
            a, b = canonical(dW, rank)
            kept_a, kept_b = largest(a, 0.3, rank), largest(b, 0.3, rank)
            S = np.zeros(6)
            S[:rank] = np.abs(a[:rank]).sum(1) / np.abs(kept_a[:rank]).sum(1)
            S[:rank] = np.maximum(S[:rank], np.quantile(S[:rank], 0.8))
            A, B, scales = A + 2 * kept_a, B + 2 * S * kept_b, scales + S
        assert apart(found[item], (B / scales) @ A) < 1e-8


def largest(X: Matrix, density: float, rank: int) -> Matrix:
    """The largest entries, of so many as `rank` rows or columns have."""
    count = round(density * rank * X.size / 6)
    return np.where(np.abs(X) >= np.sort(np.abs(X).ravel())[-count], X, 0)
