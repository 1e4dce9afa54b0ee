"""Updates that are easy and hard to sum, as factors, and what float64 dense NumPy says of them."""

from collections.abc import Sequence

import numpy as np

from loramerge.adapter import LowRank

M, N = 120, 90

Case = tuple[list[LowRank], list[float]]


def gaussian(
    rng: np.random.Generator, m: int, n: int, rank: int, size: float = 1.0, batch: int = 1
) -> LowRank:
    """A random update of about this size, float32, A [batch, rank, n], B [batch, m, rank]."""
    A = rng.standard_normal((batch, rank, n)) * size**0.5
    B = rng.standard_normal((batch, m, rank)) * size**0.5
    return LowRank(A.astype(np.float32), B.astype(np.float32))


def near(rng: np.random.Generator, update: LowRank, share: float) -> LowRank:
    """The update with both factors changed by noise of this relative size."""
    return LowRank(
        *(
            x + np.float32(share) * rng.standard_normal(x.shape).astype(np.float32)
            for x in (update.A, update.B)
        )
    )


def dense(update: LowRank) -> np.ndarray:
    """B @ A in float64. [*b, m, n]"""
    return np.asarray(update.B, np.float64) @ np.asarray(update.A, np.float64)


def weighted_sum(updates: Sequence[LowRank], weights: Sequence[float]) -> np.ndarray:
    """sum_t w_t dW_t in float64. [*b, m, n]"""
    return sum(w * dense(u) for u, w in zip(updates, weights, strict=True))


def cases() -> dict[str, Case]:
    """Every kind of input the thin core must be accurate on, with weights."""
    rng = np.random.default_rng(7)
    a, b = gaussian(rng, M, N, 8), gaussian(rng, M, N, 4)
    zero = np.float32(0)
    small = [gaussian(rng, 20, 16, 8) for _ in range(3)]
    found = {
        "ordinary": [a, b],
        "one alone": [a],
        "identical": [a, a],
        "near copies 1e-2 in both factors": [a, near(rng, a, 1e-2)],
        "near copies 1e-3 in both factors": [a, near(rng, a, 1e-3)],
        "near copies 1e-4": [a, LowRank(a.A, near(rng, a, 1e-4).B)],
        "near copies 1e-4 in both factors": [a, near(rng, a, 1e-4)],
        "near copies 1e-6": [a, LowRank(a.A, near(rng, a, 1e-6).B)],
        "shared A": [a, LowRank(a.A, gaussian(rng, M, N, 8).B)],
        "shared B": [a, LowRank(gaussian(rng, M, N, 8).A, a.B)],
        "one B all zero": [a, LowRank(b.A, b.B * zero)],
        "all zero": [LowRank(b.A, b.B * zero), LowRank(a.A, a.B * zero)],
        "one 1e-6 of the other": [a, gaussian(rng, M, N, 8, 1e-6)],
        "one 1e-6 of the other by B alone": [a, LowRank(b.A, b.B * np.float32(1e-6))],
        "rank 1": [gaussian(rng, M, N, 1), gaussian(rng, M, N, 1)],
        "more ranks than rows": small,
        "one row": [gaussian(rng, 1, 50, 4), gaussian(rng, 1, 50, 2)],
        "one column": [gaussian(rng, 50, 1, 4), gaussian(rng, 50, 1, 2)],
        "one number": [gaussian(rng, 1, 1, 2)],
        "wider than the rank on one side": [gaussian(rng, M, 4, 8), gaussian(rng, M, 4, 8)],
    }
    weighted: dict[str, Case] = {name: (us, [1.0] * len(us)) for name, us in found.items()}
    weighted["unequal weights"] = [a, b], [0.3, 2.0]
    weighted["negative weight"] = [a, b], [1.0, -0.7]
    weighted["difference of near copies"] = [a, near(rng, a, 1e-4)], [1.0, -1.0]
    for share in (1e-2, 1e-5, 1e-6):
        other = LowRank(a.A, near(rng, a, share).B)
        weighted[f"difference of copies {share:g} apart in B"] = [a, other], [1.0, -1.0]
    return weighted


CASES = cases()
