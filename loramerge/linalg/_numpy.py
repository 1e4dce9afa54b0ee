"""The kernels on the CPU: NumPy."""

from typing import Literal

from loramerge._lazy import np
from loramerge.adapter import Array

# Entries whose places, 8 bytes each, and a few copies of them stay in a core's cache.
CACHED = 2**15


def bits(x: Array) -> Array:
    """The bits of float32 numbers, as they lie in memory."""
    return x.view(np.int32)


def cholesky(G: Array) -> tuple[Array, Array]:
    """Lower L with G = L L^T, and ok [*b]; L is zero where G is not positive definite."""
    L = np.zeros_like(G)
    ok = np.zeros(G.shape[:-2], dtype=bool)
    for index in np.ndindex(ok.shape):
        try:
            L[index] = np.linalg.cholesky(G[index])
            ok[index] = True
        except np.linalg.LinAlgError:
            pass  # the caller reads `ok` and takes another road
    return L, ok


def gaussian(model: Array, rows: int, columns: int, seed: int) -> Array:
    """A standard normal matrix of a seed."""
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(model.dtype)


def inner(X: Array, Y: Array) -> Array:
    """X^T Y, by `dot`: while `@` computes fewer than 500 entries, no other thread may run."""
    found = np.empty((*X.shape[:-2], X.shape[-1], Y.shape[-1]), X.dtype)
    for index in np.ndindex(X.shape[:-2]):
        np.dot(X[index].T, Y[index], out=found[index])
    return found


def ranks(x: Array) -> Array:
    """The place of each number >= 0 in its row, of as many rows at once as stay in the cache."""
    rows = x.reshape(-1, x.shape[-1])
    height = max(CACHED // x.shape[-1], 1)
    place = np.tile(np.arange(x.shape[-1], dtype=np.int32), (height, 1))
    found = np.empty(rows.shape, np.int32)
    for start in range(0, len(rows), height):
        part = slice(start, start + height)
        order = _order(rows[part])
        found[part].reshape(-1)[order] = place[: len(order)]
    return found.reshape(x.shape)


def _order(x: Array) -> Array:
    """The flat places of each row [rows, n] by rising number >= 0, of equal ones the first first.

    Bits of a float32 are in the order of the numbers, and NumPy sorts 16 bits by counting: by the
    lower half, then by the upper one, takes half the time of comparing.
    """
    rows, columns = x.shape
    start = columns * np.arange(rows)[:, None]
    if x.dtype == np.float32:
        whole = x.view(np.uint32)
        low, high = whole.astype(np.uint16), (whole >> 16).astype(np.uint16)
        order = np.argsort(low, axis=-1, stable=True)
        order += start
        again = np.argsort(high.reshape(-1).take(order), axis=-1, stable=True)
        again += start
        found: Array = order.reshape(-1).take(again)
    else:
        found = np.argsort(x, axis=-1, stable=True) + start
    return found


def svd(X: Array) -> tuple[Array, Array, Array]:
    """The thin SVD. LAPACK's may not converge where that of the transpose does: then it is that."""
    try:
        U, s, Vh = np.linalg.svd(X, full_matrices=False)
    except np.linalg.LinAlgError:
        if X.ndim > 2:
            U, s, Vh = (np.stack(part) for part in zip(*map(svd, X), strict=True))
        else:
            V, s, Uh = np.linalg.svd(X.T, full_matrices=False)
            U, Vh = Uh.T, V.T
    return U, s, Vh


def tally(x: Array, bins: int) -> Array:
    """How often each whole number occurs."""
    return np.bincount(x, minlength=bins)


def word() -> Literal["uint32"]:
    """Unsigned words wrap around."""
    return "uint32"
