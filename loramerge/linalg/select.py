"""The k entries of largest magnitude of a matrix that is only ever seen in tiles: exactly k."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from msgspec import Struct

from loramerge.adapter import Array
from loramerge.linalg.kernels import double, namespace

__all__ = ["Largest", "largest", "upto"]

# How far the share of larger entries in the sample may be from that in the matrix before the look
# at the matrix has to be repeated, with the next of these; the last takes in everything. Entries of
# a low-rank matrix are not independent: with 512 rows and columns the share is good to .01, where a
# few directions hold most of it to .02.
MARGINS = (0.025, 0.1, 1.0)

# The magnitudes [*b, rows, columns] of some rows, the same each time.
Tile = Callable[[slice], Array]


class Largest(Struct, frozen=True):
    """Which entries are chosen: those above `value`, and those equal to it up to place `last`.

    value [*b]; last [*b], a place in row-major order.
    """

    value: Array
    last: Array

    def chosen(self, magnitudes: Array, row: int) -> Array:
        """True for the chosen entries of a tile [*b, rows, columns] that starts at a row."""
        xp = namespace(magnitudes)
        height, columns = magnitudes.shape[-2:]
        value = self.value[..., None, None]
        end = self.last[..., None, None]
        device = magnitudes.device
        start = xp.arange(row, row + height, dtype=xp.int64, device=device)[:, None] * columns
        above = xp.nextafter(value, xp.full_like(value, math.inf))
        picked = magnitudes >= xp.where(start <= end, value, above)
        split = (start <= end) & (end < start + columns - 1)
        if bool(xp.any(split)):
            place = start + xp.arange(columns, dtype=xp.int64, device=device)
            picked = picked & ((magnitudes > value) | (place <= end))
        found: Array = picked
        return found


def largest(tile: Tile, rows: Sequence[slice], count: Array, sample: Array) -> Largest:
    """The `count` [*b] largest magnitudes; equal ones are taken in row-major order.

    `rows` cover the matrix from the first row to the last; `sample` [*b, size] is a fair part of
    its magnitudes. It tells between which two values the wanted one lies, so that one pass has few
    to sort; where it was wrong there is another, of more. Zeros may be chosen besides: they change
    nothing.
    """
    columns = tile(rows[-1]).shape[-1]
    share = double(count) / (rows[-1].stop * columns)
    look = _Look(tile, rows, columns)
    tries = (look(count, *_bracket(sample, share, margin)) for margin in MARGINS)
    found = next((one for one in tries if one is not None), None)
    assert found is not None, "a bracket of everything holds the wanted value"
    return found


def upto(tile: Tile, rows: Sequence[slice], value: float, equals: Sequence[int]) -> Largest:
    """The magnitudes above a value, and of those equal to it the first so many of each item."""
    model = tile(rows[-1])
    xp = namespace(model)
    limit = xp.full((), value, dtype=model.dtype, device=model.device)
    look = _Look(tile, rows, model.shape[-1])
    lasts = [
        look.place(item, limit, number, look.equal(item, limit)) if number < look.end else look.end
        for item, number in enumerate(equals)
    ]
    batch = model.shape[:-2]
    last = xp.asarray(lasts, dtype=xp.int64, device=model.device)
    return Largest(xp.broadcast_to(limit, batch), xp.reshape(last, batch))


def _bracket(sample: Array, share: Array, margin: float) -> tuple[Array, Array]:
    """Two values [*b] that the wanted one lies between: low < wanted <= high."""
    xp = namespace(sample)
    size = sample.shape[-1]
    falling = xp.flip(xp.sort(sample, axis=-1), axis=-1)
    first = xp.floor((share - margin) * size) - 1
    last = xp.ceil((share + margin) * size) + 1
    places = (xp.astype(xp.clip(p, 0, size - 1), xp.int64)[..., None] for p in (first, last))
    high, low = (xp.take_along_axis(falling, place, axis=-1)[..., 0] for place in places)
    high = xp.where(first < 0, xp.full_like(high, math.inf), high)
    low = xp.where(last > size - 1, xp.zeros_like(low), low)
    return low, high


class _Look(Struct, frozen=True):
    """One pass over the tiles."""

    tile: Tile
    rows: Sequence[slice]
    columns: int

    def __call__(self, count: Array, low: Array, high: Array) -> Largest | None:
        """The choice, or None where it is not decided in (low, high] for some item of the batch."""
        xp = namespace(low)
        lows, highs, wanted = (xp.reshape(x, (-1,)) for x in (low, high, count))
        items = range(lows.shape[0])
        ranks = [int(wanted[i]) for i in items]
        between: list[list[Array]] = [[] for _ in items]
        for rows in self.rows:
            magnitudes = self._flat(rows)
            # What lies between is as many as it is: items of a batch have to part here.
            for i in items:
                above = magnitudes[i, :] > highs[i]
                ranks[i] -= int(xp.count_nonzero(above))
                between[i].append(magnitudes[i, :][(magnitudes[i, :] > lows[i]) & ~above])
        values, lasts = [], []
        for i in items:
            bounds = float(lows[i]), float(highs[i])
            value = _kth(xp.concat(between[i]), ranks[i], *bounds)
            if value is None:
                return None
            values.append(value)
            lasts.append(self._last(i, value, ranks[i], between[i]))
        last = xp.asarray(lasts, dtype=xp.int64, device=low.device)
        return Largest(xp.reshape(xp.stack(values), low.shape), xp.reshape(last, low.shape))

    def _flat(self, rows: slice) -> Array:
        """A tile with one row for each item of the batch."""
        found = self.tile(rows)
        flat: Array = namespace(found).reshape(found, (-1, found.shape[-2] * found.shape[-1]))
        return flat

    def _last(self, item: int, value: Array, rank: int, between: list[Array]) -> int:
        """The place of the last of those equal to the value among the first `rank` magnitudes."""
        xp = namespace(value)
        missing = rank - sum(int(xp.count_nonzero(part > value)) for part in between)
        equal = [int(xp.count_nonzero(part == value)) for part in between]
        return self.place(item, value, missing, equal) if sum(equal) > missing else self.end

    def place(self, item: int, value: Array, number: int, equal: Iterable[int]) -> int:
        """The place of the `number`-th entry equal to the value, given how many each tile has."""
        if number == 0:
            return -1
        for rows, here in zip(self.rows, equal, strict=True):
            if number <= here:
                places = namespace(value).nonzero(self._flat(rows)[item, :] == value)[0]
                return int(rows.start * self.columns + places[number - 1])
            number -= here
        return self.end

    def equal(self, item: int, value: Array) -> Iterator[int]:
        """How many entries of each tile are equal to the value."""
        for rows in self.rows:
            yield int(namespace(value).count_nonzero(self._flat(rows)[item, :] == value))

    @property
    def end(self) -> int:
        """A place behind the last."""
        return int(self.rows[-1].stop * self.columns)


def _kth(values: Array, rank: int, low: float, high: float) -> Array | None:
    """The value of this rank among those in (low, high]; None where it is not there.

    0 where only zeros are left, infinity where none is wanted.
    """
    xp = namespace(values)
    if 1 <= rank <= values.shape[0]:
        value: Array = xp.sort(values)[values.shape[0] - rank]
        return value
    if rank > 0:
        return None if low > 0 else xp.zeros((), dtype=values.dtype, device=values.device)
    limit = xp.full((), math.inf, dtype=values.dtype, device=values.device)
    return None if high < math.inf else limit
