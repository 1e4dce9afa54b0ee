"""The kernels on the CPU: NumPy."""

from loramerge._lazy import np
from loramerge.adapter import Array


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
    """The place of each number >= 0 in its row."""
    columns = x.shape[-1]
    place = np.arange(columns, dtype=np.int32)
    if x.dtype == np.float32:  # bits are in the order of the numbers; the column comes after them
        order = x.view(np.int32).astype(np.int64)
        order <<= 32
        order |= place
        order.sort(axis=-1)
        order &= 0xFFFFFFFF
    else:
        order = np.argsort(x, axis=-1, stable=True)
    rows = x.size // columns
    order = order.reshape(rows, columns)
    order += columns * np.arange(rows)[:, None]
    found = np.empty(x.size, np.int32)
    found[order] = place
    return found.reshape(x.shape)


def tally(x: Array, bins: int) -> Array:
    """How often each whole number occurs."""
    return np.bincount(x, minlength=bins)
