"""Random numbers that depend on nothing but key, row and column.

The same bits on any device, in any batch, tile or order: a hash of counters instead of a stream.
"""

from collections.abc import Sequence

from loramerge.adapter import Array
from loramerge.linalg.kernels import kernels, namespace
from loramerge.linalg.kernels import like as as_dtype

__all__ = ["uniform"]

WORD = 0xFFFFFFFF
# A 32-bit mixer of the "lowbias32" kind (Wellons, hash-prospector) whose multipliers stay below
# 2^31: products with 32-bit words fit in int64, the only wide integer torch can shift everywhere.
# Where there are words of 32 bits they wrap around, to the same bits in half the time.
FIRST, SECOND = 0x21F0AAAD, 0x735A2D97
# Where rows, columns and the second word of a row start counting: the odd parts of pi, e and phi.
ROWS, COLUMNS, AGAIN = 0x243F6A89, 0x2B7E1517, 0x1E3779B9
# The upper 24 bits are the most a float32 in [0, 1) can hold exactly.
KEPT_BITS = 24


def uniform(
    keys: Sequence[int], origin: tuple[int, int], shape: tuple[int, int], like: Array
) -> Array:
    """Numbers in [0, 1) for the tile of a matrix that starts at `origin`. [*b, rows, columns]

    One key below 2^32 for each item of the batch `like` [*b, ., .] is of; the dtype and device are
    those of `like`. Two keys, two rows or two columns have nothing to do with each other.
    """
    xp = namespace(like)
    batch = like.shape[:-2]
    word = getattr(xp, kernels(like).word())
    key = xp.reshape(xp.asarray(list(keys), dtype=word, device=like.device), (*batch, 1, 1))
    (top, left), (rows, columns) = origin, shape
    row = xp.arange(top, top + rows, dtype=word, device=like.device)[:, None]
    column = xp.arange(left, left + columns, dtype=word, device=like.device)
    first = _mixed(_mixed((row + ROWS) & WORD) ^ _mixed((key + AGAIN) & WORD))
    second = _mixed((first + AGAIN) & WORD) ^ key
    # Two words a row: rows that share the first by chance (they do, 2^16 rows in) differ all the
    # same. The second enters between the mixer's rounds.
    x = _mixed(first ^ _mixed((column + COLUMNS) & WORD), second)
    x >>= 32 - KEPT_BITS
    return as_dtype(x, like) * 2.0**-KEPT_BITS


def _mixed(x: Array, between: Array | int = 0) -> Array:
    """A bijection of 32-bit words, under which neighbours look unrelated.

    `x` is overwritten; `between` is added between the rounds.
    """
    x ^= x >> 16
    x *= FIRST
    x += between
    x &= WORD
    x ^= x >> 15
    x *= SECOND
    x &= WORD
    x ^= x >> 15
    return x
