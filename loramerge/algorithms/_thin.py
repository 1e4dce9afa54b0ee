"""All updates of a module in one small space, where spectral methods do their sums.

Q and P are orthonormal bases of the columns and the rows of all updates together, with at most
sum_t r_t axes. w_t dW_t = Q M_t P^T exactly, so what a method does with singular vectors of m x n
matrices it does with those of the small M_t, and no m x n matrix is ever there. Q and P are no
canonical bases: only what does not depend on their choice may be done in them.
"""

from msgspec import Struct

from loramerge.adapter import Array, LowRank, Updates
from loramerge.linalg.factors import summed
from loramerge.linalg.kernels import kernels, namespace
from loramerge.linalg.spectrum import Basis, Spectrum, basis, decompose

__all__ = ["Thin", "Triples", "condition", "cosines", "polar", "spread", "thin"]

# Axes shorter than this are lengthened by its inverse and no more. The factor on what changes is
# then 1 / SHORT at most, while the published form, SHORT = 0, jumps where two updates coincide.
# Measured: no set of the testbed scores differently up to 0.3; at 0.7 adapters that share their
# initial A lose .04.
SHORT = 0.3
# Smallest eigenvalue of a Gram matrix of unit vectors that is not rounding.
ROUNDING = 2.0**-52


class Triples(Struct, frozen=True):
    """Singular triples of all updates side by side: U [*b, p, K], s [*b, K], V [*b, q, K].

    Those of one update stand together, in falling order; `ranks` counts them. s >= 0: the sign of
    a weight stands in U.
    """

    U: Array
    s: Array
    V: Array
    ranks: tuple[int, ...]


class Thin(Struct, frozen=True):
    """Every M_t [*b, p, q] as factors in float64: A [*b, r_t, q], B [*b, p, r_t]."""

    left: Basis
    right: Basis
    factors: tuple[LowRank, ...]

    def matrices(self) -> list[Array]:
        """Every M_t [*b, p, q], multiplied out."""
        return [factor.B @ factor.A for factor in self.factors]

    def triples(self) -> Triples:
        """The singular triples of every M_t."""
        xp = namespace(self.factors[0].A)
        found = [decompose(factor) for factor in self.factors]
        return Triples(
            U=xp.concat([one.left @ one.u for one in found], axis=-1),
            s=xp.concat([one.s for one in found], axis=-1),
            V=xp.concat([(one.vh @ one.right).mT for one in found], axis=-1),
            ranks=tuple(int(one.s.shape[-1]) for one in found),
        )

    def lifted(self, M: Array, condition: Array | None = None) -> Spectrum:
        """The update Q M P^T of a matrix M [*b, p, q]."""
        U, s, Vh = kernels(M).svd(M)
        left, right = self.left, self.right
        return Spectrum(
            left.columns, left.mix @ U, s, Vh @ right.mix.mT, right.columns.mT, condition=condition
        )


def thin(updates: Updates) -> Thin:
    """The weighted updates in the space that they span together."""
    whole, known = summed(updates)
    left, right = basis(whole.B, known.B), basis(whole.A.mT, known.A)
    factors, start = [], 0
    for factor in updates.factors:
        own = slice(start, start := start + factor.rank)
        A, B = right.coefficients[..., own].mT, left.coefficients[..., own]
        factors.append(LowRank(A=A, B=B))
    return Thin(left, right, tuple(factors))


def polar(X: Array) -> Array:
    """X (X^T X)^(-1/2), the orthonormal columns nearest to those of X, where X has full rank.

    Singular values below SHORT become s / SHORT instead of 1: the inverse root is damped.
    """
    xp = namespace(X)
    squares, E = xp.linalg.eigh(X.mT @ X)
    lengths = xp.clip(squares, min=0.0) ** 0.5
    found: Array = X @ (E / xp.clip(lengths, min=SHORT)[..., None, :]) @ E.mT
    return found


def cosines(U: Array, V: Array) -> Array:
    """Inner products of all terms u_i v_i^T of two matrices of unit columns. [*b, K, K]"""
    found: Array = (U.mT @ U) * (V.mT @ V)
    return found


def condition(U: Array, V: Array, share: Array) -> Array:
    """Largest over smallest eigenvalue of the Gram matrix of all terms u_i v_i^T. [*b]

    Each takes part by its share [*b, K], from 0 to 1.
    """
    xp = namespace(share)
    # Where a term is missing, one at right angles to all others stands in its place.
    missing = (1 - share**2)[..., None, :] * xp.eye(
        share.shape[-1], dtype=share.dtype, device=share.device
    )
    values = xp.linalg.eigvalsh(cosines(U, V) * share[..., None, :] * share[..., None] + missing)
    found: Array = values[..., -1] / xp.clip(values[..., 0], min=ROUNDING)
    return found


def spread(largest: Array, least: Array) -> Array:
    """How many times the least the largest is, both >= 0; 1 where the least is nothing."""
    xp = namespace(least)
    some, one = least > 0, xp.ones_like(least)
    found: Array = xp.where(some, largest, one) / xp.where(some, least, one)
    return found
