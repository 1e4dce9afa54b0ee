"""RobustMerge: large entries of the factors, with the small directions scaled up."""

import math
from typing import Annotated

from msgspec import Meta

from loramerge.adapter import Array, LowRank, Updates
from loramerge.algorithms._gauges import in_gauge
from loramerge.linalg.factors import doubled, pad
from loramerge.linalg.kernels import like, namespace
from loramerge.linalg.select import largest
from loramerge.options import Options, Share
from loramerge.registry import Score, merger

# Scales of rows below this quantile of the adapter's are raised to it (the paper's att_ratio .2).
QUANTILE = 0.8
# Rows and columns of a factor that are looked at for where its threshold may lie.
SAMPLE = 512


class RobustOptions(Options, frozen=True):
    """What is pruned."""

    density: Annotated[
        Share, Meta(description="Share of the entries of each A and of each B that stay.")
    ] = 0.2


@merger(
    "robust",
    paper="arXiv:2502.17159",
    options=RobustOptions,
    example="loramerge robust a b --density 0.3",
    scale="auto",
    cost="one-shot",
    score=Score(0.132, "robust --rank 16 --scale auto"),
)
def robust(updates: Updates, options: RobustOptions) -> LowRank:
    """Prune both factors, scale each row for what it lost, merge A and B apart (RobustMerge).

    Of A_t and B_t the largest --density of the entries stay. S_t,i = |A_t,i|_1 / |pruned A_t,i|_1
    for row i, raised to the 80 % quantile of the adapter's; A = 2 sum_t pruned A_t and
    B = 2 (sum_t S_t pruned B_t) / sum_t S_t.

    Where it differs. It is defined on factors, which are no property of an update; ours are those
    of the svd gauge, so that the result does not depend on how a file splits its update. Lower
    ranks are padded with zeros; weights go to both factors as sqrt|w|, their sign to B. What A and
    B of different adapters make of each other (cross terms) remains, as in the paper.

    What to expect. Little: eight adapters in one of rank 16 score .13 exact match, the sum .53.
    """
    terms, scales = [], []
    for factor, weight, scaling in zip(
        updates.factors, updates.weights, updates.scalings, strict=True
    ):
        # In float64, as a threshold turns the rounding of singular vectors into whole entries.
        term = in_gauge(doubled(factor), scaling, "svd")
        root = abs(weight) ** 0.5
        A = term.A * root
        B = term.B * (root if weight >= 0 else -root)
        pruned = _largest(A, options.density)
        scales.append(_scale(A, pruned))
        terms.append(LowRank(A=pruned, B=_largest(B, options.density)))
    rank = max(term.rank for term in terms)
    padded = [
        pad(LowRank(t.A, t.B * s[..., None, :]), rank) for t, s in zip(terms, scales, strict=True)
    ]
    # A row of scales padded as the B it stands beside.
    rows = [pad(LowRank(t.A, s[..., None, :]), rank).B for t, s in zip(terms, scales, strict=True)]
    total = sum(rows[1:], start=rows[0])
    xp = namespace(total)
    inverse = 2 / xp.where(total > 0, total, xp.ones_like(total))
    A = 2 * sum((term.A for term in padded[1:]), start=padded[0].A)
    B = sum((term.B for term in padded[1:]), start=padded[0].B) * inverse
    model = updates.factors[0].B
    return LowRank(A=like(A, model), B=like(B, model))


def _largest(X: Array, density: float) -> Array:
    """The largest entries of each matrix, of equal ones the first; the others are zero."""
    xp = namespace(X)
    *batch, rows, columns = X.shape
    sizes = abs(X)
    part = sizes[..., :: math.ceil(rows / SAMPLE), :: math.ceil(columns / SAMPLE)]
    sample = xp.reshape(part, (*batch, part.shape[-2] * part.shape[-1]))
    kept = max(round(density * rows * columns), 1)
    count = xp.full(tuple(batch), kept, dtype=xp.int64, device=X.device)
    cut = largest(lambda tile: sizes[..., tile, :], [slice(0, rows)], count, sample)
    found: Array = X * like(cut.chosen(sizes, 0), X)
    return found


def _scale(A: Array, pruned: Array) -> Array:
    """How much longer each row was, at least the adapter's quantile; 0 where all is 0. [*b, r]"""
    xp = namespace(A)
    whole, left = xp.sum(abs(A), axis=-1), xp.sum(abs(pruned), axis=-1)
    scale = like(left > 0, A) * whole / xp.where(left > 0, left, xp.ones_like(left))
    rising = xp.sort(scale, axis=-1)
    place = QUANTILE * (A.shape[-2] - 1)
    low, share = int(place), place - int(place)
    high = min(low + 1, A.shape[-2] - 1)
    least = rising[..., low] * (1 - share) + rising[..., high] * share
    found: Array = xp.maximum(scale, least[..., None]) * like(whole > 0, A)
    return found
