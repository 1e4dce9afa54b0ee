"""Thresholds over the whole model, counted in two passes over all modules.

First: how many magnitudes lie in each of 2^18 ranges. Then: how often each of the 2^13 values of
the range that holds the threshold occurs. Counts are whole numbers, so that neither batches nor
tiles nor threads change what is chosen.
"""

import struct
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from msgspec import Struct

from loramerge.adapter import Array, Updates
from loramerge.algorithms._options import SparseOptions
from loramerge.algorithms._scope import Bound, ranks, single
from loramerge.algorithms._spaces import Stack, encode
from loramerge.linalg.kernels import kernels, namespace
from loramerge.registry import Census

__all__ = ["CENSUS", "bounds"]

# The bits of a float32 >= 0 are in order of its size: the first say in which range it lies, the
# last which of the values there it is. Few enough ranges to count in a CPU's cache, few enough
# values to keep how often each occurs in every module.
HIGH, LOW = 18, 13
# More than any module has.
EVERY = 2**62


class Spread(Struct, frozen=True):
    """Magnitudes of each adapter by range, and how many there are: int64 [T, 2^18], int64 [T]."""

    ranges: Array
    entries: Array

    def __add__(self, other: "Spread") -> "Spread":
        return Spread(self.ranges + other.ranges, self.entries + other.entries)


class Place(Struct, frozen=True):
    """Where a threshold lies: in this range, so many from its top; 0 is above everything."""

    at: int
    rank: int


class Details(Struct, frozen=True):
    """How often each value of a threshold's range occurs: in all, and by module.

    total int64 [T, thresholds, values]; a module has values and their counts for each of these.
    """

    total: Array
    modules: Mapping[str, Sequence[Sequence[tuple[Array, Array]]]]

    def __add__(self, other: "Details") -> "Details":
        return Details(self.total + other.total, {**self.modules, **other.modules})


class Limit(Struct, frozen=True):
    """A threshold, and how many entries equal to it are chosen in each module."""

    value: float
    equals: Mapping[str, int]


Places: TypeAlias = Sequence[Sequence[Place]]
Limits: TypeAlias = Sequence[Sequence[Limit]]


def bounds(updates: Updates, place: int) -> tuple[Bound, ...]:
    """What a census found for one of the updates; nothing where none was taken."""
    if updates.known is None:
        return ()
    limits: Limits = updates.known
    return tuple(
        Bound(limit.value, tuple(limit.equals.get(name, 0) for name in updates.names))
        for limit in limits[updates.positions[place]]
    )


def _passes(options: SparseOptions) -> int:
    thresholds = options.sparsify in ("magnitude", "breadcrumbs")
    return 2 if thresholds and options.trim_scope == "model" else 0


def _count(updates: Updates, options: SparseOptions) -> Spread | Details:
    stack = encode(updates, options.space)
    return _spread(updates, stack) if updates.known is None else _details(updates, stack)


def _settle(total: Spread | Details, options: SparseOptions, known: Places) -> Places | Limits:
    return _places(total, options) if isinstance(total, Spread) else _limits(total, known)


CENSUS = Census(passes=_passes, count=_count, settle=_settle)


def _spread(updates: Updates, stack: Stack) -> Spread:
    xp = namespace(stack.rows)
    none = xp.zeros(2**HIGH, dtype=xp.int64, device=stack.rows.device)
    found, counted = [none] * updates.count, [0 * xp.sum(stack.rows)] * updates.count
    for place, position in enumerate(updates.positions):
        counted[position] = xp.sum(stack.rows * stack.columns)
        for rows in stack.tiles():
            ranges = xp.reshape(_bits(stack, place, rows) >> LOW, (-1,))
            found[position] = found[position] + kernels(ranges).tally(ranges, 2**HIGH)
    return Spread(xp.stack(found), xp.stack(counted))


def _bits(stack: Stack, place: int, rows: slice) -> Array:
    magnitudes = single(stack.tile(place, rows))
    return kernels(magnitudes).bits(magnitudes)


def _places(spread: Spread, options: SparseOptions) -> Places:
    wanted = ranks(options, spread.entries)
    return [
        [_from_top(spread.ranges[t, ...], int(rank[t])) for rank in wanted]
        for t in range(spread.entries.shape[0])
    ]


def _from_top(counts: Array, rank: int) -> Place:
    """Where the number of this rank from the top lies, given how many have each value. [n]"""
    if rank == 0:
        return Place(0, 0)
    xp = namespace(counts)
    up_to = xp.flip(xp.cumulative_sum(xp.flip(counts)))
    place = int(xp.count_nonzero(up_to >= rank)) - 1
    return Place(place, rank - int(up_to[place] - counts[place]))


def _details(updates: Updates, stack: Stack) -> Details:
    places: Places = updates.known
    xp = namespace(stack.rows)
    none = xp.zeros(0, dtype=xp.int32, device=stack.rows.device)
    empty = [[(none, none)] * len(row) for row in places]
    modules = {name: [list(row) for row in empty] for name in updates.names}
    total = xp.zeros((len(places), len(places[0]), 2**LOW), dtype=xp.int64, device=none.device)
    for place, position in enumerate(updates.positions):
        for which, threshold in enumerate(places[position]):
            if threshold.rank == 0:
                continue
            for item, values in enumerate(_within(stack, place, threshold.at)):
                modules[updates.names[item]][position][which] = tuple(xp.unique_counts(values))
                found = kernels(values).tally(values, 2**LOW)
                total[position, which, ...] = total[position, which, ...] + found
    return Details(total, modules)


def _within(stack: Stack, place: int, at: int) -> list[Array]:
    """The values in one range, for each item of the batch: as many as they are."""
    parts: list[list[Array]] = []
    for rows in stack.tiles():
        found = _bits(stack, place, rows)
        xp = namespace(found)
        flat = xp.reshape(found, (-1, found.shape[-2] * found.shape[-1]))
        inside = (flat >> LOW) == at
        parts.append([flat[i, :][inside[i, :]] & (2**LOW - 1) for i in range(flat.shape[0])])
    return [xp.concat(item) for item in zip(*parts, strict=True)]


def _limits(details: Details, places: Places) -> Limits:
    return [
        [_limit(details, t, which, place) for which, place in enumerate(row)]
        for t, row in enumerate(places)
    ]


def _limit(details: Details, t: int, which: int, place: Place) -> Limit:
    """One threshold to the bit; those equal to it are taken in the order of module names."""
    if place.rank == 0:
        return Limit(float("inf"), {})
    value = _from_top(details.total[t, which, ...], place.rank)
    left, equals = value.rank, {}
    for name in sorted(details.modules):
        values, counts = details.modules[name][t][which]
        xp = namespace(values)
        here = int(xp.sum(counts[values == value.at]))
        equals[name] = EVERY if here <= left else left
        left -= min(here, left)
    bits = struct.pack("<I", place.at << LOW | value.at)
    return Limit(struct.unpack("<f", bits)[0], equals)
