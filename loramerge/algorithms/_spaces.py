"""The coordinates in which an element-wise rule sees the updates, and the way back.

In every space the coordinates of an update are still a product of thin factors, so that they are
formed tile by tile. A plain sum is the same update in all of them; anything else is not.
"""

import math
from collections.abc import Iterator
from typing import Literal, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from loramerge.adapter import Array, LowRank, Updates
from loramerge.linalg.dense import compress
from loramerge.linalg.factors import scale
from loramerge.linalg.kernels import double, gram, like, namespace
from loramerge.linalg.spectrum import Spectrum, decompose

__all__ = ["Space", "Stack", "decode", "encode"]

Space: TypeAlias = Literal["knots", "core", "dense"]

# Singular values up to this share of the largest are no axes of their own (KnOTS' cut).
AXES = 1e-5
# Rows that are multiplied in one go: BLAS rounds by the shape of its operands, so that a product
# is the same to the bit only where it is cut the same way.
BLOCK = 32
# Entries of a tile, all adapters together: some that stay in a CPU's cache, some that fill a GPU.
CPU_TILE, GPU_TILE = 2**20, 2**27
# Rows and columns of a sample: the share of entries above a value is good to .01 in it.
SAMPLE = 512


class Stack(Struct, frozen=True):
    """Every weighted update w_t dW_t in the coordinates of a space, as factors.

    factors: A [*b, r_t, q], B [*b, p, r_t]; keys of random masks as in Updates. left [*b, m, p] and
    right [*b, q, n], in float64, lead back to updates; None where the coordinates are the update's
    own. Axes beyond the numerical rank are zero and come last; `rows` and `columns` [*b] count the
    others.
    """

    factors: tuple[LowRank, ...]
    keys: tuple[tuple[int, ...], ...]
    left: Array | None
    right: Array | None
    rows: Array
    columns: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """(*b, p, q) of the coordinates of one update."""
        first = self.factors[0]
        return (*first.B.shape[:-1], first.A.shape[-1])

    def tiles(self) -> Iterator[slice]:
        """Rows in groups, from the first to the last."""
        *batch, p, q = self.shape
        on_cpu = str(self.factors[0].A.device) == "cpu"
        row = len(self.factors) * q * math.prod(batch)
        height = max((CPU_TILE if on_cpu else GPU_TILE) // row // BLOCK, 1) * BLOCK
        for start in range(0, p, height):
            yield slice(start, min(start + height, p))

    def tile(self, position: int, rows: slice) -> Array:
        """The coordinates of one adapter in these rows, which start at a multiple of BLOCK."""
        factor = self.factors[position]
        xp = namespace(factor.B)
        A, B = factor.A, factor.B[..., rows, :]
        *batch, height, r = B.shape
        even = height // BLOCK * BLOCK
        parts = []
        if even:
            blocks = xp.reshape(B[..., :even, :], (*batch, even // BLOCK, BLOCK, r))
            parts.append(xp.reshape(blocks @ A[..., None, :, :], (*batch, even, A.shape[-1])))
        if even < height:
            parts.append(B[..., even:, :] @ A)
        found: Array = parts[0] if len(parts) == 1 else xp.concat(parts, axis=-2)
        return found

    def entries(self, rows: slice) -> Array:
        """The coordinates of all adapters in these rows. [k, *b, rows, q]"""
        tiles = [self.tile(position, rows) for position in range(len(self.factors))]
        found: Array = namespace(tiles[0]).stack(tiles)
        return found

    def sample(self, position: int) -> Array:
        """Coordinates of one adapter, evenly spaced over rows and columns. [*b, size]"""
        factor = self.factors[position]
        rows, columns = (slice(None, None, math.ceil(x / SAMPLE)) for x in self.shape[-2:])
        taken = factor.B[..., rows, :] @ factor.A[..., columns]
        flat: Array = namespace(taken).reshape(taken, (*taken.shape[:-2], -1))
        return flat


def encode(updates: Updates, space: Space) -> Stack:
    """The weighted updates in the coordinates of a space.

    knots: [w_1 dW_1 .. w_T dW_T] = U [Z_1 .. Z_T], U orthonormal; Z_t = U^T w_t dW_t, rows by
    falling singular value. core: M_t = U^T w_t dW_t V, V the right singular vectors of the stack
    [w_1 dW_1; ..; w_T dW_T]. dense: w_t dW_t itself. All are taken from the factors; none depends
    on how a file factors its update.
    """
    factors = tuple(map(scale, updates.factors, updates.weights))
    left, right = None, None
    if space != "dense":
        xp = namespace(factors[0].A)
        A = xp.concat([double(f.A) for f in factors], axis=-2)
        B = xp.concat([double(f.B) for f in factors], axis=-1)
        left = _axes(B, _own_gram(A.mT, factors))
        right = _axes(A.mT, _own_gram(B, factors)).mT if space == "core" else None
        factors = tuple(_projected(f, left, right) for f in factors)
    return Stack(
        factors=factors,
        keys=updates.keys or _keys(updates),
        left=left,
        right=right,
        rows=_live(factors[0].B, left),
        columns=_live(factors[0].A.mT, None if right is None else right.mT),
    )


def _projected(factor: LowRank, left: Array, right: Array | None) -> LowRank:
    A = factor.A if right is None else like(double(factor.A) @ right.mT, factor.A)
    return LowRank(A=A, B=like(left.mT @ double(factor.B), factor.B))


def _keys(updates: Updates) -> tuple[tuple[int, ...], ...]:
    """Keys for updates that came without: the same for all items of a batch."""
    items = math.prod(updates.factors[0].A.shape[:-2])
    return tuple((updates.seed + t & 0xFFFFFFFF,) * items for t in range(len(updates.factors)))


def _own_gram(X: Array, factors: tuple[LowRank, ...]) -> Array:
    """X^T X of one side of all factors, zero between different adapters. float64 [*b, s, s]"""
    xp = namespace(X)
    owner = [float(t) for t, f in enumerate(factors) for _ in range(f.rank)]
    place = xp.asarray(owner, dtype=X.dtype, device=X.device)
    own: Array = gram(X) * like(place[:, None] == place, X)
    return own


def _axes(X: Array, G: Array) -> Array:
    """Left singular vectors of X G^(1/2), in falling order, zero where s <= 1e-5 s_max.

    X [*b, d, s] are all adapters' factors of one side, G the Gram matrices of their other sides:
    so the axes are those of [dW_1 .. dW_T], whatever the factors are. The largest entry of each
    axis is positive.
    """
    xp = namespace(G)
    values, vectors = xp.linalg.eigh(G)
    # In float64 throughout: neighbouring singular values mix what float32 rounds.
    root = vectors * (xp.clip(values, min=0.0) ** 0.5)[..., None, :]
    found = decompose(LowRank(A=root, B=X))
    U = found.left @ found.u
    up, down = xp.max(U, axis=-2), -xp.min(U, axis=-2)
    kept = found.s > AXES * found.s[..., :1]
    sign = xp.where(up >= down, xp.ones_like(up), -xp.ones_like(up))
    axes: Array = U * xp.where(kept, sign, xp.zeros_like(sign))[..., None, :]
    return axes


def _live(model: Array, axes: Array | None) -> Array:
    """How many rows of the coordinates [*b, p, .] are axes. int64 [*b]"""
    xp = namespace(model)
    if axes is None:
        live = xp.ones(model.shape[:-1], dtype=xp.int64, device=model.device)
    else:
        live = xp.astype(xp.any(axes != 0, axis=-2), xp.int64)
    count: Array = xp.sum(live, axis=-1)
    return count


def decode(stack: Stack, merged: Array, updates: Updates) -> LowRank | Spectrum:
    """The update with these coordinates [*b, p, q].

    Low-rank as it stands in knots and core space. A dense result [*b, m, n] has every rank: it
    comes back as an SVD with at least the wanted number of terms.
    """
    if stack.left is None:
        return _compressed(stack, merged, updates)
    if stack.right is None:
        return LowRank(A=merged, B=like(stack.left, merged))
    return LowRank(A=like(stack.right, merged), B=like(stack.left, merged) @ merged)


def _compressed(stack: Stack, W: Array, updates: Updates) -> Spectrum:
    xp = namespace(W)
    square = xp.sum(double(xp.linalg.vecdot(W, W)), axis=-1)
    inner = sum(xp.sum(double(xp.linalg.vecdot(f.B.mT @ W, f.A)), axis=-1) for f in stack.factors)
    return replace(compress(W, updates.rank, updates.seed), whole=(square, inner))
