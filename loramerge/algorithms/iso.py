"""Iso-C and Iso-CTS: all directions of a merge made equally strong."""

from typing import Annotated, Literal

from msgspec import Meta

from loramerge.adapter import Array, Updates
from loramerge.algorithms._thin import condition, polar, spread, thin
from loramerge.linalg.kernels import kernels, like, namespace
from loramerge.linalg.spectrum import Spectrum
from loramerge.options import Options, Share
from loramerge.registry import always, merger
from loramerge.traits import Score

# Directions weaker than this share of the mean strength (by energy) count by how near they come to
# it: what is hardly there must not leap to the strength of all.
FAINT = 0.1
# Singular values up to this share of the largest are no directions.
NULL = 1e-5


class IsoOptions(Options, frozen=True):
    """Which directions the result has."""

    directions: Annotated[
        Literal["common", "task"],
        Meta(
            description="common: those of the sum (Iso-C). task: the strongest of the sum, and of "
            "each update what they do not span (Iso-CTS)."
        ),
    ] = "common"
    common: Annotated[
        Share, Meta(description="task: share of the directions that come from the sum.")
    ] = 0.8


def is_whitened(options: IsoOptions) -> bool:
    """Whether directions of several updates are made orthogonal."""
    return options.directions == "task"


@merger(
    "iso",
    paper="arXiv:2502.04959",
    options=IsoOptions,
    example="loramerge iso a b --rank full",
    scale="auto",
    flat=always,
    orthogonal=is_whitened,
    place="thin",
    cost="one-shot",
    score=Score(0.026, "iso --rank 16 --scale auto"),
)
def iso(updates: Updates, options: IsoOptions) -> Spectrum:
    """Give all singular directions of the sum the same strength (Iso-C, Iso-CTS).

    sum_t w_t dW_t = U S V^T becomes s U V^T, s the mean singular value over the numerical rank
    (Iso-C). With --directions task (Iso-CTS) the strongest k of the K directions stay; each update
    adds the (K - k) / T strongest of w_t dW_t - U_k U_k^T w_t dW_t; all of them are made orthogonal
    as in tsv, and s is the mean of all their singular values.

    Where it differs. The published code takes the mean over min(m, n) singular values, of which an
    adapter has but few. Directions of the sum below a tenth of the mean strength fade out instead
    of leaping to s, and the whitening is damped as in tsv. Iso-CTS keeps its count of directions,
    which leaps with the numerical rank of the sum.

    The condition in the report is the strongest over the weakest direction of the sum, by which
    each is divided; a tenth of the mean is the least. That of Iso-CTS is the one of tsv.

    What to expect. A flat spectrum has no low-rank version: eight adapters score .03 when it is cut
    to rank 16, far below the sum; use --rank full.
    """
    space = thin(updates)
    matrices = space.matrices()
    total = sum(matrices[1:], start=matrices[0])
    xp = namespace(total)
    U, s, Vh = kernels(total).svd(total)
    if options.directions == "task":
        U, s, Vh = _with_tasks(U, s, Vh, matrices, options.common, updates.count)
    share = _share(s, FAINT if options.directions == "common" else NULL)
    count = xp.clip(xp.sum(share, axis=-1, keepdims=True), min=1.0)
    level = xp.sum(s * share, axis=-1, keepdims=True) / count
    if options.directions == "task":
        found = condition(U, Vh.mT, share)
        U, V = polar(U * share[..., None, :]), polar(Vh.mT * share[..., None, :])
        return space.lifted((U * level[..., None, :]) @ V.mT, found)
    lifted = (U * (level * share)[..., None, :]) @ Vh
    return space.lifted(lifted, _unevenness(s, share))


def _with_tasks(
    U: Array, s: Array, Vh: Array, matrices: list[Array], common: float, count: int
) -> tuple[Array, Array, Array]:
    """The strongest triples of the sum, then of each update those that they do not span."""
    xp = namespace(s)
    place = xp.arange(s.shape[-1], dtype=s.dtype, device=s.device)
    rank = xp.sum(like(s > NULL * s[..., :1], s), axis=-1, keepdims=True)
    kept = xp.round(common * rank)
    first = like(place < kept, s)
    found = [(U, s * first, Vh)]
    each = xp.floor((rank - kept) / count)
    most = int((1 - common) * s.shape[-1] / count) + 1
    spanned = U * first[..., None, :]
    for M in matrices:
        P, d, Qh = kernels(M).svd(M - spanned @ (spanned.mT @ M))
        d = d[..., :most] * like(place[:most] < each, s)
        found.append((P[..., :most], d, Qh[..., :most, :]))
    return (
        xp.concat([one[0] for one in found], axis=-1),
        xp.concat([one[1] for one in found], axis=-1),
        xp.concat([one[2] for one in found], axis=-2),
    )


def _share(s: Array, faint: float) -> Array:
    """1 for every direction of the numerical rank, less where one is faint. [*b, K]"""
    xp = namespace(s)
    total = xp.sum(s, axis=-1, keepdims=True)
    mean = xp.sum(s**2, axis=-1, keepdims=True) / xp.where(total > 0, total, xp.ones_like(total))
    share: Array = xp.clip(s / xp.where(mean > 0, faint * mean, xp.ones_like(mean)), max=1.0)
    return share


def _unevenness(s: Array, share: Array) -> Array:
    """The strongest direction over the weakest, each of which is divided by its strength. [*b]"""
    xp = namespace(s)
    first = s[..., :1]
    strengths = xp.where(s > NULL * first, s / xp.where(share > 0, share, xp.ones_like(s)), first)
    return spread(s[..., 0], xp.min(strengths, axis=-1))
