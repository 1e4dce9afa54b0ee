"""The exact thin SVD of a factored matrix, computed from its factors alone.

Each side is orthonormalised by the cheapest road that is accurate for it: a Gram matrix in the
factors' own precision and its Cholesky factor; where columns are nearly dependent, a float64 Gram
matrix and its eigenvectors; where even that is ambiguous, or there are about as many columns as
rows, QR. A Gram matrix squares the condition number, which is why the road is chosen per matrix.
Columns are scaled to unit length first, so that one update 1e-6 the size of another is no
ill-conditioned case, and its own singular values stay accurate relative to themselves.
"""

from typing import Protocol

from msgspec import Struct
from msgspec.structs import replace

from loramerge.adapter import Array, LowRank
from loramerge.linalg.factors import Grams
from loramerge.linalg.kernels import double, gram, kernels, like, namespace, put

__all__ = ["Basis", "Spectrum", "basis", "columnwise", "decompose", "lift", "randomized"]

# A float32 Gram matrix has entries good to 1e-7, so squared pivots must stay well above that for
# singular values good to 1e-3 of themselves.
CHOLESKY_PIVOT = 0.03
# Eigenvalues of a float64 Gram matrix of unit columns: below NULL they are rounding noise of exact
# copies, above SURE they are good to 1e-3; between the two only QR can tell.
NULL, SURE = 1e-14, 1e-11
# From this share of columns to rows on, QR costs no more than a Gram matrix.
QR_SHARE = 0.6
# A squared float32 column norm below this may have lost digits to underflow.
TINY = 1e-30
# Rows laid side by side in a reduction over columns.
FOLD = 64
# Singular values below this share of all rank-1 terms' lengths are what rounding leaves of terms
# that cancel.
CANCELLED = 100 * 2.0**-52


class Spectrum(Struct, frozen=True):
    """A thin SVD not yet lifted: U = left @ u, Vh = vh @ right, s descending in float64.

    left [*b, m, p], u [*b, p, q], s [*b, q], vh [*b, q, p'], right [*b, p', n]. Where these are
    only the leading part of an update, or it is known, `whole` is its squared norm and its inner
    product with the weighted sum of the inputs, both [*b]. `condition` [*b] is that of the problem
    a method solved, where it reports one.
    """

    left: Array
    u: Array
    s: Array
    vh: Array
    right: Array
    whole: tuple[Array, Array] | None = None
    condition: Array | None = None

    def truncated(self, rank: int) -> LowRank:
        """The best approximation of this rank, sqrt(s) on each side (Eckart-Young-Mirsky).

        Signs are fixed: the largest entry of every column of B is positive.
        """
        root = self.s[..., :rank] ** 0.5
        B = lift(self.left, self.u[..., :, :rank] * root[..., None, :])
        sign = _signs(B)
        mix = self.vh[..., :rank, :] * (root * double(sign))[..., :, None]
        return LowRank(A=like(like(mix, self.right) @ self.right, B), B=B * sign[..., None, :])

    def scaled(self, factor: float) -> "Spectrum":
        """The thin SVD of factor * dW; the sign of the factor goes to U."""
        u = self.u if factor >= 0 else -self.u
        whole = self.whole and (self.whole[0] * factor**2, self.whole[1] * factor)
        return replace(self, u=u, s=self.s * abs(factor), whole=whole)


def lift(columns: Array, mix: Array) -> Array:
    """Columns @ mix, computed and returned in the dtype of columns."""
    return columns @ like(mix, columns)


def decompose(update: LowRank, known: Grams | None = None) -> Spectrum:
    """The exact thin SVD of B @ A, with as many singular values as B @ A can have."""
    out = basis(update.B, known.B if known else None)
    into = basis(update.A.mT, known.A if known else None)
    core = out.coefficients @ into.coefficients.mT
    xp = namespace(core)
    U, s, Vh = kernels(core).svd(core)
    terms = xp.sum(_norms(out.coefficients) * _norms(into.coefficients), axis=-1)
    s = xp.where(s > CANCELLED * terms[..., None], s, xp.zeros_like(s))
    return Spectrum(out.columns, out.mix @ U, s, Vh @ into.mix.mT, into.columns.mT)


class Reduction(Protocol):
    """A reduction of the array API, such as max."""

    def __call__(self, x: Array, *, axis: int) -> Array:
        """The reduced array."""


class Basis(Struct, frozen=True):
    """X [*b, d, K] = Q C, with Q = columns @ mix orthonormal and C = coefficients in float64.

    `own` says that columns are X itself, and otherwise they are Q.
    """

    columns: Array
    mix: Array
    coefficients: Array
    own: bool = False


def _norms(X: Array) -> Array:
    """The length of every column. [*b, K]"""
    squares: Array = namespace(X).sum(X**2, axis=-2)
    return squares**0.5


def basis(X: Array, G: Array | None = None) -> Basis:
    """An orthonormal basis of the columns of X [*b, d, K] by the road that is accurate for it.

    Every item of a batch takes its own. G is X^T X, where it is known.
    """
    rows, columns = X.shape[-2:]
    if columns > QR_SHARE * rows:
        Q, R = _by_qr(double(X))
        return Basis(Q, _eye(R, R.shape[-2]), R)
    xp = namespace(X)
    found, sure = _by_cholesky(X, gram(X) if G is None else G)
    if bool(xp.all(sure)):
        return found
    Q, C = _with_care(X[~sure])
    return Basis(
        columns=put(X, ~sure, like(Q, X)),
        mix=put(found.mix, ~sure, _eye(C, columns)),
        coefficients=put(found.coefficients, ~sure, C),
    )


def _by_cholesky(X: Array, G: Array) -> tuple[Basis, Array]:
    """Q = X N^-1 L^-T, from G = X^T X = N L L^T N with N the column norms; and where it is safe."""
    xp = namespace(X)
    squares = xp.linalg.diagonal(G)
    large = squares > TINY
    norms = xp.where(large, squares, xp.ones_like(squares)) ** 0.5
    L, ok = kernels(X).cholesky(G / (norms[..., :, None] * norms[..., None, :]))
    clear = large & (xp.linalg.diagonal(L) > CHOLESKY_PIVOT)
    sure = ok & xp.all(clear, axis=-1)
    safe = xp.where(sure[..., None, None], L, _eye(L, L.shape[-1]))
    mix = xp.linalg.inv(safe).mT / norms[..., :, None]
    return Basis(X, mix, L.mT * norms[..., None, :], own=True), sure


def _with_care(X: Array) -> tuple[Array, Array]:
    """Q and C of matrices [b, d, K] whose columns are nearly dependent."""
    X = double(X)
    Q, C, sure = _by_eigenvectors(X)
    if bool(namespace(X).all(sure)):
        return Q, C
    q, r = _by_qr(X[~sure])
    return put(Q, ~sure, q), put(C, ~sure, r)


def _by_eigenvectors(X: Array) -> tuple[Array, Array, Array]:
    """Q and C from G = E diag(w) E^T in float64, null directions zero; and where w tells which."""
    xp = namespace(X)
    G = gram(X)
    norms = xp.linalg.diagonal(G) ** 0.5
    unit = xp.where(norms > 0, norms, xp.ones_like(norms))
    values, E = xp.linalg.eigh(G / (unit[..., :, None] * unit[..., None, :]))
    kept = values > SURE
    zero = xp.zeros_like(values)
    root = xp.where(kept, values, zero + 1) ** 0.5
    Q = X @ (E * xp.where(kept, 1 / root, zero)[..., None, :] / unit[..., :, None])
    C = (E * xp.where(kept, root, zero)[..., None, :]).mT * norms[..., None, :]
    return Q, C, xp.all(kept | (values <= NULL), axis=-1)


def _by_qr(X: Array) -> tuple[Array, Array]:
    Q, R = namespace(X).linalg.qr(X)
    return Q, R


def _eye(model: Array, size: int) -> Array:
    identity: Array = namespace(model).eye(size, dtype=model.dtype, device=model.device)
    return identity


def _signs(B: Array) -> Array:
    """+1 or -1 for each column: the sign of its entry of largest magnitude. [*b, r]"""
    xp = namespace(B)
    highest, lowest = columnwise(xp.max, B), columnwise(xp.min, B)
    return like(highest >= -lowest, B) * 2 - 1


def columnwise(reduce: Reduction, X: Array) -> Array:
    """A reduction over the rows of X [*b, d, K]. [*b, K]

    NumPy reduces a tall matrix of few columns ten times slower than a wide one, so rows are laid
    side by side first.
    """
    xp = namespace(X)
    *batch, rows, columns = X.shape
    whole = rows - rows % FOLD
    if whole == 0:
        return reduce(X, axis=-2)
    wide = xp.reshape(X[..., :whole, :], (*batch, rows // FOLD, FOLD * columns))
    found = reduce(xp.reshape(reduce(wide, axis=-2), (*batch, FOLD, columns)), axis=-2)
    if whole == rows:
        return found
    return reduce(xp.stack([found, reduce(X[..., whole:, :], axis=-2)]), axis=0)


def randomized(update: LowRank, rank: int, oversample: int, power: int, seed: int) -> Spectrum:
    """The range finder of Halko, Martinsson and Tropp (arXiv:0909.4061, algorithms 4.4 and 5.1).

    Works on B @ A through its factors. Never nearer than `decompose`, and slower at LoRA's ranks.
    """
    xp = namespace(update.B)
    B, A = double(update.B), double(update.A)
    columns = min(rank + oversample, B.shape[-2], A.shape[-1])
    Q = xp.linalg.qr(B @ (A @ kernels(A).gaussian(A, A.shape[-1], columns, seed)))[0]
    for _ in range(power):
        Q = xp.linalg.qr(A.mT @ (B.mT @ Q))[0]
        Q = xp.linalg.qr(B @ (A @ Q))[0]
    U, s, Vh = kernels(A).svd((Q.mT @ B) @ A)
    return Spectrum(Q, U, s, xp.eye(s.shape[-1], dtype=Vh.dtype, device=Vh.device), Vh)
