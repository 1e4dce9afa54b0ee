"""Element-wise merging, and the words its papers use."""

from collections.abc import Callable
from typing import TypeAlias

from loramerge.adapter import Array, LowRank, Updates
from loramerge.algorithms._spaces import decode, encode
from loramerge.algorithms._sparsify import SparseOptions, sparsifier
from loramerge.linalg.kernels import like, namespace
from loramerge.linalg.spectrum import Spectrum

__all__ = ["Rule", "disjoint_mean", "elect_sign", "merge_entries"]

# What becomes of the entries of all adapters: [k, *b, rows, q] -> [*b, rows, q].
Rule: TypeAlias = Callable[[Array], Array]


def merge_entries(updates: Updates, options: SparseOptions, rule: Rule) -> LowRank | Spectrum:
    """Apply a rule to the weighted, sparsified updates, entry by entry.

    Two passes over tiles of the coordinates: one for thresholds, one for the values. What is held
    whole is the merged coordinates [*b, p, q] alone; in dense space that is one update in full.
    """
    stack = encode(updates, options.space)
    count = len(stack.factors)
    thin = [sparsifier(stack, position, options) for position in range(count)]
    model = stack.factors[0].B
    xp = namespace(model)
    merged = xp.empty(stack.shape, dtype=model.dtype, device=model.device)
    for rows in stack.tiles():
        values = [thin[t](stack.tile(t, rows), rows.start) for t in range(count)]
        merged[..., rows, :] = rule(xp.stack(values))
    return decode(stack, merged, updates)


def elect_sign(values: Array) -> Array:
    """The sign of the larger mass, +1 or -1: that of the sum over adapters; a sum of 0 elects +1.

    values [k, ...] -> [...].
    """
    xp = namespace(values)
    total = xp.sum(values, axis=0)
    return like(total >= 0, values) * 2 - 1


def disjoint_mean(values: Array, sign: Array) -> Array:
    """The mean over the adapters whose entry is not zero and has the elected sign; 0 if none has.

    values [k, ...], sign [...] -> [...].
    """
    xp = namespace(values)
    agreeing = xp.clip(values * sign, min=0.0)
    count = xp.sum(like(agreeing > 0, values), axis=0)
    mean: Array = sign * xp.sum(agreeing, axis=0) / xp.clip(count, min=1.0)
    return mean
