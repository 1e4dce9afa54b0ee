"""LoRA-FAIR without data: the mean of the A, and the B that then comes nearest to the sum."""

from msgspec.structs import replace

from loramerge.adapter import LowRank, Updates
from loramerge.algorithms._gauges import in_gauge
from loramerge.algorithms._thin import spread
from loramerge.linalg.factors import doubled, pad
from loramerge.linalg.kernels import gram, like, namespace
from loramerge.linalg.spectrum import Spectrum, decompose
from loramerge.options import Options
from loramerge.registry import Score, merger

# Directions of the mean A below this share of its largest are no directions.
NULL = 1e-10


class FairOptions(Options, frozen=True):
    """Nothing to choose."""


@merger(
    "fair",
    paper="arXiv:2411.14961",
    options=FairOptions,
    example="loramerge fair a b",
    scale="auto",
    cost="one-shot",
    score=Score(0.179, "fair --rank 16 --scale auto"),
)
def fair(updates: Updates, options: FairOptions) -> Spectrum:
    """Average the A, then correct B so that B A is nearest to the weighted sum (LoRA-FAIR).

    A = mean_t A_t, B = (sum_t w_t B_t A_t A^T) (A A^T)^-1: the least ||B A - sum_t w_t dW_t||.

    Where it differs. The paper corrects the mean of the B during federated rounds; this is its
    limit, from the adapters alone. Its factors are those that training left, which are no property
    of an update; ours are those of the svd gauge, sqrt(S) V^T and U sqrt(S) with the largest entry
    of each column of B positive, so that the result does not depend on how a file splits its
    update. Lower ranks are padded with zeros. Where two singular values of an update meet, or two
    entries tie for the largest, its factors leap, and the result with them. Cutting the sum is
    never further from it (`arithmetic --rank`). The condition in the report is that of A A^T.

    What to expect. Little: eight adapters in one of rank 16 score .18 exact match, the sum .53.
    """
    terms = [
        doubled(in_gauge(factor, scaling, "svd"))
        for factor, scaling in zip(updates.factors, updates.scalings, strict=True)
    ]
    rank = max(term.rank for term in terms)
    padded = [pad(term, rank) for term in terms]
    A = sum((term.A for term in padded[1:]), start=padded[0].A) / updates.count
    xp = namespace(A)
    values, E = xp.linalg.eigh(gram(A.mT))
    live = values > NULL * values[..., -1:]
    inverse = like(live, values) / xp.where(live, values, xp.ones_like(values))
    crossed = [
        w * (term.B @ (term.A @ A.mT)) for term, w in zip(padded, updates.weights, strict=True)
    ]
    B = sum(crossed[1:], start=crossed[0]) @ (E * inverse[..., None, :]) @ E.mT
    least = xp.min(xp.where(live, values, values[..., -1:]), axis=-1)
    return replace(decompose(LowRank(A=A, B=B)), condition=spread(values[..., -1], least))
