"""The sum of `tsv`, set right on what every task reads, as a small mix of rows that are there."""

from typing import NamedTuple

from loramerge.adapter import Array, Updates
from loramerge.algorithms._inputs import Inputs
from loramerge.algorithms._orthogonal import orthogonal
from loramerge.linalg.kernels import double, gram, like, namespace
from loramerge.linalg.spectrum import Basis, Spectrum

__all__ = ["Mixed", "between", "corrected", "decomposed", "singular"]

# Singular values below this share of the largest are rounding of their squares.
ROUNDING = 1e-7


class Mixed(NamedTuple):
    """Q Z rows, Q the orthonormal columns of `left`: Z [*b, p, k], rows [*b, k, n].

    `target` [*b, p, k] is the Z of the weighted sum, `products` are those of the rows. Nothing but
    the rows is as wide as a module.
    """

    left: Basis
    Z: Array
    target: Array
    rows: Array
    products: Array


def corrected(
    updates: Updates, read: Inputs, solved: Array, answered: Array, share: Array
) -> tuple[Mixed, Array]:
    """W_0 + share sum_t (w_t dW_t - W_0) G_t (H + l I)^-1, and the condition of W_0. [*b]

    W_0 = Q M P^T is the sum of `tsv`. What is added is share times
    sum_t w_t dW_t G_t (H + l I)^-1 - W_0 F^T (F F^T + l I)^-1 F, all of it in the span of Q;
    `solved` is that inverse, `answered` what `answers` makes of it, and share [*b].
    """
    space, M, condition = orthogonal(updates)
    rows, products, axes = _placed(read, space.right)
    start, k = M @ axes, read.products.shape[-1]
    seen = start @ products[..., :k] @ read.mix.mT @ solved @ read.mix
    change = share[..., None, None] * (space.left.coefficients @ answered - seen)
    more = rows.shape[-2] - k
    target = _padded(space.left.coefficients, rows.shape[-2] - read.own.stop, read.own.start)
    return Mixed(space.left, start + _padded(change, more), target, rows, products), condition


def _placed(read: Inputs, right: Basis) -> tuple[Array, Array, Array]:
    """Rows, their products, and P^T over them [*b, q, k]; `right` is P.

    The rows are those read, and where these are nearly dependent P^T stands beside them.
    """
    if right.own:
        after = read.products.shape[-1] - read.own.stop
        return read.rows, read.products, _padded(right.mix.mT, after, read.own.start)
    xp = namespace(read.rows)
    rows = xp.concat([read.rows, like(right.columns.mT, read.rows)], axis=-2)
    products = gram(double(rows).mT)
    axes = xp.broadcast_to(right.mix.mT, (*products.shape[:-2], *right.mix.mT.shape[-2:]))
    return rows, products, _padded(axes, 0, read.products.shape[-1])


def _padded(Z: Array, after: int, before: int = 0) -> Array:
    """Z with so many columns of zeros after its own, and before."""
    xp = namespace(Z)
    some = [
        xp.zeros((*Z.shape[:-1], size), dtype=Z.dtype, device=Z.device) for size in (before, after)
    ]
    found: Array = xp.concat([some[0], Z, some[1]], axis=-1)
    return found


def between(near: Mixed, far: Mixed, share: Array) -> Mixed:
    """So much [*b] of the first and the rest of the second, which is in the span of Q.

    The rows of the second are the first of those of the first.
    """
    left, Z = near.left, near.Z
    if left.own and far.left.own and left.columns is far.left.columns:
        turned = (far.left.coefficients @ left.mix).mT
    else:
        turned = left.mix.mT @ (double(left.columns).mT @ double(far.left.columns)) @ far.left.mix
    share = share[..., None, None]
    more = Z.shape[-1] - far.Z.shape[-1]
    return near._replace(Z=share * Z + (1 - share) * _padded(turned @ far.Z, more))


def singular(mixed: Mixed) -> tuple[Array, Array]:
    """The left singular vectors of Z rows [*b, p, p], and its singular values. [*b, p]"""
    xp = namespace(mixed.Z)
    squares, E = xp.linalg.eigh(mixed.Z @ mixed.products @ mixed.Z.mT)
    s, u = xp.flip(xp.clip(squares, min=0.0) ** 0.5, axis=-1), xp.flip(E, axis=-1)
    return u, xp.where(s > ROUNDING * s[..., :1], s, xp.zeros_like(s))


def decomposed(mixed: Mixed, condition: Array) -> Spectrum:
    """The thin SVD."""
    u, s = singular(mixed)
    xp = namespace(s)
    short = xp.where(s > 0, 1 / xp.where(s > 0, s, xp.ones_like(s)), xp.zeros_like(s))
    vh = short[..., :, None] * (u.mT @ mixed.Z)
    left = mixed.left
    whole = xp.sum(s**2, axis=-1), xp.sum(mixed.Z @ mixed.products * mixed.target, axis=(-2, -1))
    # In float64, as rows that are nearly alike cancel.
    rows = double(mixed.rows)
    return Spectrum(left.columns, left.mix @ u, s, vh, rows, whole, condition)
