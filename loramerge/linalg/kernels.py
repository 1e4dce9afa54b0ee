"""The narrow seam between the two backends.

Plain arithmetic goes through the array API's namespace of the array at hand (`namespace`), which
NumPy, torch (by array-api-compat) and array-api-strict share. What that standard does not offer is
a kernel, written once in `_numpy.py` and once in `_torch.py`. NumPy computes on the CPU and never
imports torch; torch computes on CUDA and MPS. Leading dimensions *b are batches everywhere.
"""

from typing import Any, Literal, Protocol, cast

from loramerge._lazy import array_api_torch
from loramerge.adapter import Array

__all__ = ["Kernels", "double", "gram", "kernels", "like", "namespace", "put"]


class Kernels(Protocol):
    """What the array API lacks, with the same meaning in both backends."""

    def cholesky(self, G: Array) -> tuple[Array, Array]:
        """Lower L with G = L L^T, and ok [*b]: False where G is not positive definite."""

    def bits(self, x: Array) -> Array:
        """The bits of float32 numbers >= 0 as int32, in the order of the numbers."""

    def gaussian(self, model: Array, rows: int, columns: int, seed: int) -> Array:
        """A standard normal [rows, columns] matrix of a seed, the same values on any device."""

    def inner(self, X: Array, Y: Array) -> Array:
        """X^T Y of tall X [*b, d, K] and Y [*b, d, L] of one dtype, in that. [*b, K, L]"""

    def ranks(self, x: Array) -> Array:
        """The place of numbers >= 0 in their row [..., n], 0 for the smallest; int32.

        Of equal ones the first is first.
        """

    def svd(self, X: Array) -> tuple[Array, Array, Array]:
        """The thin SVD U, s, Vh of X [*b, m, n]."""

    def tally(self, x: Array, bins: int) -> Array:
        """How often each of 0 .. bins - 1 occurs in whole numbers x [n]. int64 [bins]"""

    def word(self) -> Literal["uint32", "int64"]:
        """The name of the narrowest dtype that can shift, add and multiply 32-bit words."""


def kernels(x: Array) -> Kernels:
    """The backend that computes on the kind of array x is."""
    if type(x).__module__.startswith("torch"):
        from loramerge.linalg import _torch

        return cast(Kernels, _torch)
    from loramerge.linalg import _numpy

    return cast(Kernels, _numpy)


def namespace(x: Array) -> Any:
    """The array API namespace of an array. NumPy 2 is its own; its compatibility layer is slow."""
    return x.__array_namespace__() if hasattr(x, "__array_namespace__") else array_api_torch


def double(x: Array) -> Array:
    """X in float64."""
    xp = namespace(x)
    return cast(Array, xp.astype(x, xp.float64, copy=False))


def like(x: Array, model: Array) -> Array:
    """X in the dtype of model."""
    return cast(Array, namespace(x).astype(x, model.dtype, copy=False))


def put(x: Array, where: Array, values: Array) -> Array:
    """A batch with other values in some of its items: where [*b], and one or as many values."""
    found: Array = namespace(x).asarray(x, copy=True)
    found[where] = values
    return found


def gram(X: Array) -> Array:
    """X^T X of X [*b, d, K], multiplied in the dtype of X, returned in float64."""
    return double(kernels(X).inner(X, X))
