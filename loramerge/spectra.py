"""The singular values of every delta weight of an adapter, and what each rank would keep."""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

from msgspec import Struct

from loramerge.adapter import Adapter
from loramerge.compute import resolve, single_threaded_blas
from loramerge.events import Advanced, Listener, Started, silent
from loramerge.linalg.spectrum import decompose
from loramerge.reading import read_finite

__all__ = ["Spectra", "spectra"]


class Spectra(Struct, frozen=True):
    """Singular values by module, each in decreasing order; there are as many as its rank."""

    modules: Mapping[str, tuple[float, ...]]

    def energy(self, rank: int) -> float:
        """The share of the squared norm of the whole adapter that this rank of every module keeps.

        That of the best approximation (Eckart-Young): what `squeeze --rank` reports.
        """
        kept = sum(s**2 for values in self.modules.values() for s in values[:rank])
        whole = sum(s**2 for values in self.modules.values() for s in values)
        return kept / whole if whole else 1.0

    def ranks(self) -> list[int]:
        """1, 2, 4, ... up to the largest rank there is."""
        highest = max(len(values) for values in self.modules.values())
        return [*(2**power for power in range((highest - 1).bit_length())), highest]


def needed(values: Sequence[float], share: float) -> int:
    """The smallest rank that keeps this share of the squared norm."""
    whole = math.fsum(s**2 for s in values)
    sums = accumulate(s**2 for s in values)
    return next((n for n, kept in enumerate(sums, 1) if kept >= share * whole), len(values))


def stable_rank(values: Sequence[float]) -> float:
    """||dW||_F^2 / ||dW||_2^2: 1 for a rank-1 update, the rank for a flat one; 0 for zero."""
    return math.fsum(s**2 for s in values) / values[0] ** 2 if values and values[0] else 0.0


def spectra(adapter: Adapter, listen: Listener = silent) -> Spectra:
    """The spectrum of every module, from its factors. Raises IncompatibleError for NaN or Inf."""

    def one(name: str) -> tuple[float, ...]:
        values = tuple(float(s) for s in decompose(read_finite(adapter, name)).s)
        listen(Advanced(1))
        return values

    listen(Started("reading", len(adapter.modules)))
    with single_threaded_blas(), ThreadPoolExecutor(resolve("cpu", "float32").threads) as pool:
        return Spectra(dict(zip(adapter.modules, pool.map(one, adapter.modules), strict=True)))
