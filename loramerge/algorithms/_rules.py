"""Element-wise merging, and the words its papers use."""

from collections.abc import Callable
from typing import TypeAlias

from loramerge.adapter import Array, LowRank, Updates
from loramerge.algorithms._census import bounds
from loramerge.algorithms._options import ThinningOptions
from loramerge.algorithms._spaces import Space, Stack, decode, encode
from loramerge.algorithms._sparsify import sparsifier
from loramerge.linalg.kernels import like, namespace
from loramerge.linalg.spectrum import Spectrum

__all__ = ["Rule", "TileRule", "disjoint_mean", "elect_sign", "merge_entries", "merge_tiles"]

# What becomes of the entries of all adapters: [k, *b, rows, q] -> [*b, rows, q].
Rule: TypeAlias = Callable[[Array], Array]
# The same for a tile and the row it starts at.
TileRule: TypeAlias = Callable[[Array, int], Array]


def merge_entries(
    updates: Updates, options: ThinningOptions, space: Space, rule: Rule
) -> LowRank | Spectrum:
    """Apply a rule to the weighted, sparsified updates, entry by entry of a space."""

    def prepare(stack: Stack) -> TileRule:
        thin = [
            sparsifier(stack, place, options, bounds(updates, place))
            for place in range(len(stack.factors))
        ]

        def thinned(values: Array, row: int) -> Array:
            kept = [keep(values[t, ...], row) for t, keep in enumerate(thin)]
            return rule(namespace(values).stack(kept))

        return thinned

    return merge_tiles(updates, space, prepare)


def merge_tiles(
    updates: Updates, space: Space, prepare: Callable[[Stack], TileRule]
) -> LowRank | Spectrum:
    """Apply a rule that must first look at the whole module, such as for a threshold.

    `prepare` looks, and returns the rule: each as often as it needs at tiles of the coordinates.
    What is held whole is the merged coordinates [*b, p, q] alone; in dense space that is one update
    in full.
    """
    stack = encode(updates, space)
    rule = prepare(stack)
    model = stack.factors[0].B
    merged = namespace(model).empty(stack.shape, dtype=model.dtype, device=model.device)
    for rows in stack.tiles():
        merged[..., rows, :] = rule(stack.entries(rows), rows.start)
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
