"""The sum of updates whose singular vectors are made orthogonal to each other first."""

from typing import Literal, NamedTuple, TypeAlias

from loramerge.adapter import Array, Updates
from loramerge.algorithms._thin import Thin, Triples, condition, cosines, polar, thin
from loramerge.linalg.kernels import like, namespace
from loramerge.linalg.spectrum import Spectrum

__all__ = ["Orthogonal", "Smoothing", "orthogonal", "orthogonal_sum"]

Smoothing: TypeAlias = Literal["none", "average", "linear"]

# A triple below this share of the module's largest is mostly rounding: it counts by how near it
# comes to this, so that it turns no other, and nothing leaps where a rank is zero.
FAINT = 1e-5
# Largest ratio of first to last singular value of a linear spectrum (DC-Merge's rho).
STEEPEST = 5.0
# Thirds of a place add up to a whole one within this.
HAIR = 1e-6


class Orthogonal(NamedTuple):
    """The sum [*b, p, q] in the space of all updates, and the condition. [*b]"""

    space: Thin
    sum: Array
    condition: Array


def orthogonal_sum(updates: Updates, smooth: Smoothing = "none") -> Spectrum:
    """U' S V'^T of TSV-M (arXiv:2412.00081), as `tsv` says it. Every update [*b]."""
    found = orthogonal(updates, smooth)
    return found.space.lifted(found.sum, found.condition)


def orthogonal(updates: Updates, smooth: Smoothing = "none") -> Orthogonal:
    """The same, not yet multiplied out."""
    space = thin(updates)
    found = space.triples()
    first = updates.factors[0]
    share = _share(found, min(first.B.shape[-2], first.A.shape[-1]))
    s = _smoothed(found, share, smooth)
    U, V = (polar(X * share[..., None, :]) for X in (found.U, found.V))
    return Orthogonal(space, (U * s[..., None, :]) @ V.mT, condition(found.U, found.V, share))


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
