"""TSV-M: the singular vectors of all updates, made orthogonal to each other."""

from typing import Annotated, Literal, TypeAlias

from msgspec import Meta

from loramerge.adapter import Array, Updates
from loramerge.algorithms._thin import Triples, condition, cosines, polar, thin
from loramerge.linalg.kernels import like, namespace
from loramerge.linalg.spectrum import Spectrum
from loramerge.options import Options
from loramerge.registry import Score, always, merger

Smoothing: TypeAlias = Literal["none", "average", "linear"]

# A triple below this share of the module's largest is mostly rounding: it counts by how near it
# comes to this, so that it turns no other, and nothing leaps where a rank is zero.
FAINT = 1e-5
# Largest ratio of first to last singular value of a linear spectrum (DC-Merge's rho).
STEEPEST = 5.0
# Thirds of a place add up to a whole one within this.
HAIR = 1e-6


class TsvOptions(Options, frozen=True):
    """What becomes of the spectra."""

    smooth: Annotated[
        Smoothing,
        Meta(
            description="Spectrum of each update, its sum kept (DC-Merge): as it is (none), all "
            "singular values equal (average), or falling in a straight line (linear)."
        ),
    ] = "none"


def is_flat(options: TsvOptions) -> bool:
    """Whether the singular values of each update become equal."""
    return options.smooth == "average"


@merger(
    "tsv",
    paper="arXiv:2412.00081",
    options=TsvOptions,
    example="loramerge tsv a b --rank 16",
    scale="paper",
    place="thin",
    cost="one-shot",
    flat=is_flat,
    orthogonal=always,
    score=Score(0.604, "tsv --rank 16 --scale paper"),
)
def tsv(updates: Updates, options: TsvOptions) -> Spectrum:
    """Make the singular vectors of all updates orthogonal to each other, then add up (TSV-M).

    w_t dW_t = U_t S_t V_t^T, U = [U_1 .. U_T], V = [V_1 .. V_T], S all S_t on one diagonal. With
    U = P D Q^T let U' = P Q^T, the orthonormal vectors nearest to those of U (whitening, or
    orthogonal Procrustes), and V' likewise. The result is U' S V'^T: no update is longer or
    shorter for it, and none stands in another's way. All ranks of an update take part; where those
    of all exceed a side of the module, the largest singular values that fit. A weight scales S_t
    and may be negative.

    Where it differs. Updates that overlap make U nearly singular, and P Q^T leaps with the last
    digit of the input: four copies of one adapter come out 1.7 times as far from it as it is long,
    two checkpoints of one run with twice their energy. Here a singular value d of U below 0.3
    becomes d / 0.3 instead of 1, so that a change of the input by 1e-3 changes the result by no
    more than 1e-2; T copies of an adapter come back as that adapter. Above 0.3 nothing differs.
    Zero-padded ranks take no part. The published code takes min(m, n) / T singular vectors of each
    update, null space included: for LoRA another method, and a worse one.

    The condition in the report is that of the Gram matrix of all terms u_i v_i^T: 1 where updates
    have nothing in common, without bound for copies.

    What to expect. The best published rule at its own length, with no lambda to choose: eight
    adapters in one score .64 exact match with every rank and .60 cut to rank 16, the sum at its
    best lambda .53 there. --smooth only loses on these: linear .28 and .00, average .07 and .00.
    --calibrate gains .01 to .03 here and loses .11 after gentle training: docs/calibrations.md.
    """
    space = thin(updates)
    found = space.triples()
    first = updates.factors[0]
    share = _share(found, min(first.B.shape[-2], first.A.shape[-1]))
    s = _smoothed(found, share, options.smooth)
    U, V = (polar(X * share[..., None, :]) for X in (found.U, found.V))
    return space.lifted((U * s[..., None, :]) @ V.mT, condition(found.U, found.V, share))


def _share(found: Triples, room: int) -> Array:
    """How far each triple takes part: 1, less where it is faint, 0 where it does not fit. [*b, K]

    Copies take the room of one.
    """
    xp = namespace(found.s)
    largest = xp.max(found.s, axis=-1, keepdims=True)
    faint = xp.where(largest > 0, FAINT * largest, xp.ones_like(largest))
    share: Array = xp.clip(found.s / faint, max=1.0)
    if found.s.shape[-1] > room:
        copies = xp.round(xp.sum(cosines(found.U, found.V) ** 2, axis=-1))
        order = xp.argsort(-found.s, axis=-1, stable=True)
        taken = 1 / xp.clip(xp.take_along_axis(copies, order, axis=-1), min=1.0)
        fits = xp.cumulative_sum(taken, axis=-1) <= room + HAIR
        share = share * like(xp.take_along_axis(fits, xp.argsort(order, axis=-1), axis=-1), share)
    return share


def _smoothed(found: Triples, share: Array, how: Smoothing) -> Array:
    """The singular values of what takes part, each update's smoothed on its own. [*b, K]"""
    xp = namespace(share)
    parts, start = [], 0
    for rank in found.ranks:
        own = slice(start, start := start + rank)
        part = share[..., own]
        s = xp.where(part > 0, found.s[..., own], xp.zeros_like(part))
        parts.append(s if how == "none" else _spread(s, part, how == "linear"))
    smoothed: Array = xp.concat(parts, axis=-1)
    return smoothed


def _spread(s: Array, share: Array, ramp: bool) -> Array:
    """The sum of s over all that take part: evenly, or falling in a straight line. [*b, r]"""
    xp = namespace(s)
    one = xp.ones_like(s[..., :1])
    form = share
    if ramp:
        last = xp.min(xp.where(share >= 1, s, s[..., :1]), axis=-1, keepdims=True)
        steep = xp.clip(s[..., :1] / xp.where(last > 0, last, one), min=1.0, max=STEEPEST)
        place = xp.cumulative_sum(share, axis=-1) - share
        end = xp.clip(xp.sum(share, axis=-1, keepdims=True) - 1, min=1.0)
        form = share * (steep - (steep - 1) * place / end)
    total = xp.sum(form, axis=-1, keepdims=True)
    spread: Array = form * xp.sum(s, axis=-1, keepdims=True) / xp.where(total > 0, total, one)
    return spread
