"""Sparsifiers: which entries of an update an element-wise rule gets to see."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

from loramerge.adapter import Array
from loramerge.algorithms._options import ThinningOptions
from loramerge.algorithms._scope import Bound, choices
from loramerge.algorithms._spaces import Stack
from loramerge.linalg.kernels import double, kernels, like, namespace
from loramerge.linalg.masks import uniform

__all__ = ["Thin", "sparsifier"]

# Below every chance but 0: no number drawn is smaller, so that what is divided by it is 0.
NEVER = 2.0**-60

# A pure function of one tile [*b, rows, q] and the row it starts at.
Thin: TypeAlias = Callable[[Array, int], Array]


def sparsifier(
    stack: Stack, position: int, options: ThinningOptions, bounds: Sequence[Bound] = ()
) -> Thin:
    """The sparsifier of one adapter: what it must know of the module is found out here, once.

    `bounds` are what is known of the whole model.
    """
    make = {
        "none": _none,
        "magnitude": _magnitude,
        "dare": _dare,
        "della": _della,
        "breadcrumbs": _breadcrumbs,
    }
    return make[options.sparsify](stack, position, options, bounds)


def _none(stack: Stack, position: int, options: ThinningOptions, bounds: Sequence[Bound]) -> Thin:
    return lambda values, row: values


def _magnitude(
    stack: Stack, position: int, options: ThinningOptions, bounds: Sequence[Bound]
) -> Thin:
    """Keep the largest entries: exactly ceil(density * entries) of them."""
    (kept,) = choices(stack, position, options, bounds)
    return lambda values, row: _kept(kept(values, row), values)


def _dare(stack: Stack, position: int, options: ThinningOptions, bounds: Sequence[Bound]) -> Thin:
    """Keep each entry with chance `density`, divided by it (arXiv:2311.03099)."""

    def thin(values: Array, row: int) -> Array:
        return _kept(_draw(stack, position, values, row) < options.density, values) * (
            1 / options.density
        )

    return thin


def _della(stack: Stack, position: int, options: ThinningOptions, bounds: Sequence[Bound]) -> Thin:
    """Keep an entry with a chance that grows with its rank in its row, divided by that chance.

    p = density - epsilon + 2 epsilon (rank - 1) / (n - 1) (MagPrune, arXiv:2406.11617). Where
    density leaves less room to 0 or 1 than epsilon, epsilon is that room.
    """
    density = options.density
    epsilon = min(options.epsilon, density, 1 - density)

    xp = namespace(stack.columns)
    columns = double(stack.columns)[..., None, None]
    slope = 2 * epsilon / xp.clip(columns - 1, min=1.0)

    def thin(values: Array, row: int) -> Array:
        # Axes that are none hold zeros, which come first in the order.
        place = like(kernels(values).ranks(abs(values)), values)
        rank = xp.clip(place - like(values.shape[-1] - columns, values), min=0.0)
        chance = like(slope, values) * rank + (density - epsilon)
        kept = like(_draw(stack, position, values, row) < chance, values)
        found: Array = values * kept / xp.clip(chance, min=NEVER)
        return found

    return thin


def _breadcrumbs(
    stack: Stack, position: int, options: ThinningOptions, bounds: Sequence[Bound]
) -> Thin:
    """Drop the largest gamma and so many of the smallest that density is kept (arXiv:2312.06795).

    Where gamma and density exceed the whole, less than gamma is dropped.
    """
    largest, outliers = choices(stack, position, options, bounds)
    return lambda values, row: _kept(largest(values, row) & ~outliers(values, row), values)


def _kept(kept: Array, values: Array) -> Array:
    found: Array = values * like(kept, values)
    return found


def _draw(stack: Stack, position: int, values: Array, row: int) -> Array:
    return uniform(stack.keys[position], (row, 0), values.shape[-2:], values)
