"""The sum of `tsv`, set right on what every task reads, and what lies between it and another."""

from typing import NamedTuple

from loramerge.adapter import Array, Updates
from loramerge.algorithms._inputs import Inputs, answers
from loramerge.algorithms._orthogonal import orthogonal
from loramerge.linalg.kernels import double, kernels, like, namespace
from loramerge.linalg.spectrum import Basis, Spectrum, basis

__all__ = ["Rows", "between", "corrected", "decomposed"]


class Rows(NamedTuple):
    """Q rows, Q the orthonormal columns of `left`: rows [*b, p, n], condition [*b]."""

    left: Basis
    rows: Array
    condition: Array


def corrected(updates: Updates, read: Inputs, solved: Array, share: Array) -> Rows:
    """W_0 + share sum_t (w_t dW_t - W_0) G_t (H + l I)^-1, W_0 = Q M P^T the sum of `tsv`.

    The sum is sum_t w_t dW_t G_t (H + l I)^-1 - W_0 F^T (F F^T + l I)^-1 F, all of it in the span
    of Q; `solved` is that inverse, and share [*b].
    """
    space, start, condition = orthogonal(updates)
    into, columns = start @ space.right.mix.mT, space.right.columns
    seen = into @ (read.rows @ double(columns)).mT @ read.mix.mT @ solved @ read.mix
    change = share[..., None, None] * (space.left.coefficients @ answers(read, solved) - seen)
    rows = like(into, columns) @ columns.mT + like(change @ read.rows, columns)
    return Rows(space.left, rows, condition)


def between(near: Rows, far: Spectrum, share: Array) -> Rows:
    """So much [*b] of the second, which is in the span of Q, and the rest of the first."""
    left, rows, condition = near
    turned = left.mix.mT @ (double(left.columns).mT @ double(far.left)) @ far.u
    other = like((turned * far.s[..., None, :]) @ far.vh, rows) @ like(far.right, rows)
    share = like(share, rows)[..., None, None]
    return Rows(left, (1 - share) * rows + share * other, condition)


def decomposed(found: Rows, condition: Array) -> Spectrum:
    """The thin SVD of Q rows; its condition is the larger of both."""
    left, rows, other = found
    right = basis(rows.mT)
    U, s, Vh = kernels(rows).svd(right.coefficients.mT)
    return Spectrum(
        left=left.columns,
        u=left.mix @ U,
        s=s,
        vh=Vh @ right.mix.mT,
        right=right.columns.mT,
        condition=namespace(rows).maximum(condition, other),
    )
