"""Which rank-1 terms an update is taken to consist of, before a method looks at them one by one."""

from typing import Literal, TypeAlias

from loramerge.adapter import LowRank, Updates
from loramerge.linalg.factors import concat
from loramerge.linalg.kernels import gram, like, namespace
from loramerge.linalg.spectrum import decompose

__all__ = ["Gauge", "gauged"]

Gauge: TypeAlias = Literal["svd", "balanced", "raw"]


def gauged(updates: Updates, gauge: Gauge) -> LowRank:
    """All adapters' rank-1 terms side by side, each times sqrt(|weight|) on both factors.

    The sign of a weight goes to B. A [*b, s, n], B [*b, m, s].
    """
    terms = [
        _split(in_gauge(factor, scaling, gauge), weight)
        for factor, weight, scaling in zip(
            updates.factors, updates.weights, updates.scalings, strict=True
        )
    ]
    return concat(terms, [1.0] * len(terms))


def _split(update: LowRank, weight: float) -> LowRank:
    if weight == 1:
        return update
    root = abs(weight) ** 0.5
    return LowRank(update.A * root, update.B * (root if weight >= 0 else -root))


def in_gauge(update: LowRank, scaling: float, gauge: Gauge) -> LowRank:
    """The same delta weight in another factorisation; `scaling` stands folded into B."""
    if gauge == "svd":
        return decompose(update).truncated(update.rank)
    if gauge == "raw":
        root = abs(scaling) ** 0.5 or 1.0
        return LowRank(update.A * root, update.B / root)
    xp = namespace(update.B)
    a = xp.linalg.diagonal(gram(update.A.mT)) ** 0.25
    b = xp.linalg.diagonal(gram(update.B)) ** 0.25
    live = (a > 0) & (b > 0)
    one, zero = xp.ones_like(a), xp.zeros_like(a)
    factor = like(xp.where(live, b / xp.where(live, a, one), zero), update.B)
    inverse = like(xp.where(live, a / xp.where(live, b, one), zero), update.B)
    return LowRank(update.A * factor[..., :, None], update.B * inverse[..., None, :])
