"""Element-wise merging written out: dense float64 matrices, one adapter and one step at a time."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from loramerge.adapter import LowRank, Updates
from loramerge.linalg.masks import uniform
from loramerge.linalg.spectrum import Spectrum

Matrix = np.ndarray


def low_rank(result: LowRank | Spectrum) -> LowRank:
    """A result as factors, with every rank it has."""
    return result.truncated(result.s.shape[-1]) if isinstance(result, Spectrum) else result


def delta(result: LowRank | Spectrum) -> Matrix:
    """The delta weights of a result in float64. [*b, m, n]"""
    update = low_rank(result)
    return np.asarray(update.B, np.float64) @ np.asarray(update.A, np.float64)


def apart(x: Matrix, y: Matrix) -> float:
    """The largest relative Frobenius distance of two batches of matrices."""
    gap = np.linalg.norm(x - y, axis=(-2, -1)) / np.linalg.norm(y, axis=(-2, -1))
    return float(gap.max())


def updates(
    rng: np.random.Generator,
    m: int = 60,
    n: int = 45,
    ranks: Sequence[int] = (4, 6, 3),
    weights: Sequence[float] | None = None,
    batch: int = 2,
    dtype: type = np.float64,
) -> Updates:
    """Gaussian updates with falling spectra, in float64 so that no threshold is a matter of luck.

    In float32 an entry that lies on a threshold, or a sum that is zero but for rounding, may fall
    on either side.
    """
    factors = []
    for rank in ranks:
        fall = 0.8 ** np.arange(rank)
        A = rng.standard_normal((batch, rank, n)) * fall[:, None]
        factors.append(
            LowRank(A.astype(dtype), rng.standard_normal((batch, m, rank)).astype(dtype))
        )
    return Updates(
        factors=tuple(factors),
        weights=tuple(weights or (1.0,) * len(ranks)),
        scalings=(1.0,) * len(ranks),
        keys=tuple(tuple(100 * t + i for i in range(batch)) for t in range(len(ranks))),
    )


def weighted(given: Updates, item: int) -> list[Matrix]:
    """w_t dW_t of one item of the batch."""
    pairs = zip(given.factors, given.weights, strict=True)
    return [w * (f.B[item].astype(float) @ f.A[item].astype(float)) for f, w in pairs]


def knots_axes(deltas: Sequence[Matrix]) -> Matrix:
    """U of the SVD of [dW_1 .. dW_T], its null space cut (arXiv:2410.19735). [m, p]"""
    U, s, _ = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
    U = U[:, s > 1e-5 * s[0]]
    return U * np.where(U.max(0) >= -U.min(0), 1, -1)


def trim(x: Matrix, density: float) -> Matrix:
    """The ceil(density n) largest magnitudes (TIES' trim, magnitude pruning)."""
    order = np.argsort(-np.abs(x).ravel(), kind="stable")
    kept = np.zeros(x.size)
    kept[order[: math.ceil(round(density * x.size, 6))]] = 1
    return x * kept.reshape(x.shape)


def dare(x: Matrix, density: float, key: int) -> Matrix:
    """Drop with chance 1 - density, rescale by 1 / density (arXiv:2311.03099)."""
    return np.where(draw(x, key) < density, x / density, 0)


def della(x: Matrix, density: float, epsilon: float, key: int) -> Matrix:
    """MagPrune (arXiv:2406.11617): ranks within a row, chances in a line, rescaled by them."""
    found = np.zeros_like(x)
    random = draw(x, key)
    for i, row in enumerate(x):
        for rank, j in enumerate(np.argsort(np.abs(row), kind="stable")):
            chance = density - epsilon + 2 * epsilon * rank / max(len(row) - 1, 1)
            if random[i, j] < chance:
                found[i, j] = row[j] / chance
    return found


def breadcrumbs(x: Matrix, density: float, gamma: float) -> Matrix:
    """Drop the largest gamma n, keep the density n that follow (arXiv:2312.06795)."""
    kept = math.ceil(round(density * x.size, 6))
    dropped = min(int(gamma * x.size), x.size - kept)
    order = np.argsort(-np.abs(x).ravel(), kind="stable")
    mask = np.zeros(x.size)
    mask[order[dropped : dropped + kept]] = 1
    return x * mask.reshape(x.shape)


def draw(x: Matrix, key: int) -> Matrix:
    return uniform([key], (0, 0), x.shape, x)


def elect_and_mean(values: Sequence[Matrix]) -> Matrix:
    """TIES' election by mass and disjoint mean, entry by entry (arXiv:2306.01708, algorithm 1)."""
    merged = np.zeros_like(values[0])
    for place in np.ndindex(merged.shape):
        entries = [float(x[place]) for x in values]
        sign = 1 if sum(entries) >= 0 else -1
        agreeing = [x for x in entries if x * sign > 0]
        if agreeing:
            merged[place] = sum(agreeing) / len(agreeing)
    return merged


def in_space(
    space: str, deltas: Sequence[Matrix], merge: Callable[[list[Matrix]], Matrix]
) -> Matrix:
    """A merge of matrices applied in the coordinates of a space."""
    if space == "dense":
        return merge(list(deltas))
    U = knots_axes(deltas)
    if space == "knots":
        return U @ merge([U.T @ x for x in deltas])
    V = knots_axes([x.T for x in deltas])
    return U @ merge([U.T @ x @ V for x in deltas]) @ V.T
