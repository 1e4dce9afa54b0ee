"""The largest entries of an update: those of each module, or those of the whole model."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

from msgspec import Struct

from loramerge.adapter import Array
from loramerge.algorithms._options import ThinningOptions
from loramerge.algorithms._spaces import Stack
from loramerge.linalg.kernels import double, namespace
from loramerge.linalg.select import Largest, largest, upto

__all__ = ["Bound", "Choice", "choices", "ranks", "share", "single"]

# A share of a count that is whole but for rounding is not rounded up.
ROUNDING = 1e-12

# Which entries of a tile are chosen, given its values and the row it starts at.
Choice: TypeAlias = Callable[[Array, int], Array]


class Bound(Struct, frozen=True):
    """A threshold of the whole model: entries above it, and the first `equals` of each module."""

    value: float
    equals: tuple[int, ...]


def choices(
    stack: Stack, position: int, options: ThinningOptions, bounds: Sequence[Bound] = ()
) -> list[Choice]:
    """The largest entries of one adapter, for each count in `ranks`; equal ones in their order.

    Of each item of the batch by itself, or up to the bounds of the whole model.
    """
    size = single if bounds else abs

    def magnitudes(rows: slice) -> Array:
        return size(stack.tile(position, rows))

    rows = list(stack.tiles())
    if bounds:
        cuts = [upto(magnitudes, rows, bound.value, bound.equals) for bound in bounds]
    else:
        sample = abs(stack.sample(position))
        counts = ranks(options, stack.rows * stack.columns)
        cuts = [largest(magnitudes, rows, count, sample) for count in counts]

    def choice(cut: Largest) -> Choice:
        return lambda values, row: cut.chosen(size(values), row)

    return [choice(cut) for cut in cuts]


def ranks(options: ThinningOptions, entries: Array) -> list[Array]:
    """How many of the largest are wanted of so many entries, once or twice. int64, as `entries`"""
    count = share(options.density, entries)
    if options.sparsify == "magnitude":
        return [count]
    xp = namespace(entries)
    dropped = xp.astype(xp.floor(double(entries) * options.gamma), xp.int64)
    dropped = xp.minimum(dropped, entries - count)
    return [dropped + count, dropped]


def share(density: float, entries: Array) -> Array:
    """ceil(density * entries). int64, as `entries`"""
    xp = namespace(entries)
    count: Array = xp.astype(xp.ceil(double(entries) * (density * (1 - ROUNDING))), xp.int64)
    return count


def single(values: Array) -> Array:
    """Magnitudes in float32, the precision in which a whole model's are counted."""
    xp = namespace(values)
    found: Array = xp.astype(abs(values), xp.float32, copy=False)
    return found
