"""How alike adapters are, pair by pair: directions of their updates, and the spaces they use."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from statistics import fmean

from msgspec import Struct

from loramerge.adapter import Adapter, Array, LowRank
from loramerge.align import Aligned, align
from loramerge.compute import resolve, single_threaded_blas
from loramerge.errors import UsageError
from loramerge.events import Advanced, Listener, Started, silent
from loramerge.io._names import alike
from loramerge.linalg.factors import inner_products
from loramerge.linalg.spectrum import decompose, lift
from loramerge.reading import read_finite

__all__ = ["Alike", "Pair", "similarity"]


class Alike(Struct, frozen=True):
    """One module of two adapters: squared norms of both, their inner product, and overlaps.

    An overlap is ||U_a^T U_b||_F^2 / min(r_a, r_b) of orthonormal bases, from 0 to 1: of the column
    spaces (`outputs`) and of the row spaces (`inputs`). Two random spaces have about r / d.
    """

    name: str
    a: float
    b: float
    inner: float
    outputs: float
    inputs: float

    @property
    def cosine(self) -> float | None:
        """<A, B> / (||A|| ||B||); None where one of them is zero."""
        return _cosine(self.inner, self.a, self.b)


class Pair(Struct, frozen=True):
    """Two adapters, by their places, and the modules that both have; `a`, `b` are whole norms."""

    places: tuple[int, int]
    a: float
    b: float
    modules: tuple[Alike, ...]

    @property
    def cosine(self) -> float | None:
        """Of the two adapters as one long vector each; a module one of them lacks is zero there."""
        return _cosine(math.fsum(module.inner for module in self.modules), self.a, self.b)

    @property
    def outputs(self) -> float | None:
        """The mean overlap of column spaces over shared modules; None without any."""
        return fmean(module.outputs for module in self.modules) if self.modules else None

    @property
    def inputs(self) -> float | None:
        """The mean overlap of row spaces over shared modules; None without any."""
        return fmean(module.inputs for module in self.modules) if self.modules else None


def similarity(adapters: Sequence[Adapter], listen: Listener = silent) -> tuple[Pair, ...]:
    """Every pair of adapters, the most similar first.

    Raises UsageError for fewer than two, IncompatibleError where counterparts differ in shape, no
    module is shared, or an adapter holds NaN or Inf.
    """
    if len(adapters) < 2:
        raise UsageError("similar compares adapters.", "name two or more: loramerge similar a b")
    adapters = alike(adapters, adapters[0].naming)
    modules = align(adapters, missing="zero").modules
    listen(Started("comparing", len(modules)))

    def one(module: Aligned) -> _Module:
        found = _module(adapters, module)
        listen(Advanced(1))
        return found

    with single_threaded_blas(), ThreadPoolExecutor(resolve("cpu", "float32").threads) as pool:
        seen = list(pool.map(one, modules))
    norms = [math.fsum(module.norms[place] for module in seen) for place in range(len(adapters))]
    pairs = [
        Pair((i, j), norms[i], norms[j], tuple(m.pairs[i, j] for m in seen if (i, j) in m.pairs))
        for i, j in combinations(range(len(adapters)), 2)
    ]
    return tuple(sorted(pairs, key=lambda pair: -(pair.cosine or 0.0)))


class _Module(Struct, frozen=True):
    """One module: the squared norm of each adapter's update, and the pairs that have it."""

    norms: tuple[float, ...]
    pairs: dict[tuple[int, int], Alike]


def _module(adapters: Sequence[Adapter], module: Aligned) -> _Module:
    places = [place for place, member in enumerate(module.members) if member is not None]
    updates = [read_finite(adapters[place], module.name) for place in places]
    products = inner_products(updates)
    spaces = [_spaces(update) for update in updates]
    norms = [0.0] * len(adapters)
    for here, place in enumerate(places):
        norms[place] = float(products[here, here])
    pairs = {
        (places[i], places[j]): Alike(
            module.name,
            norms[places[i]],
            norms[places[j]],
            float(products[i, j]),
            *(_overlap(*both) for both in zip(spaces[i], spaces[j], strict=True)),
        )
        for i, j in combinations(range(len(places)), 2)
    }
    return _Module(tuple(norms), pairs)


def _spaces(update: LowRank) -> tuple[Array, Array]:
    """Orthonormal bases of the columns and of the rows of a delta weight. [m, r], [n, r]"""
    found = decompose(update)
    kept = int((found.s > 0).sum())
    return lift(found.left, found.u)[:, :kept], (found.vh @ found.right)[:kept].T


def _overlap(left: Array, right: Array) -> float:
    """||left^T right||_F^2 over the smaller number of columns; 0 where there are none."""
    most = min(left.shape[-1], right.shape[-1])
    return min(float(((left.T @ right) ** 2).sum()) / most, 1.0) if most else 0.0


def _cosine(inner: float, a: float, b: float) -> float | None:
    return inner / math.sqrt(a * b) if a > 0 and b > 0 else None
