"""How two adapters differ, module by module, from their factors alone."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from msgspec import Struct

from loramerge.adapter import Adapter, LowRank
from loramerge.align import Aligned, align
from loramerge.compute import resolve, single_threaded_blas
from loramerge.io._names import alike
from loramerge.linalg.factors import Closeness, compare
from loramerge.reading import read_finite

__all__ = ["Difference", "ModuleDifference", "difference"]


class ModuleDifference(Struct, frozen=True):
    """One module of A and B: squared norms of both delta weights, inner product, squared gap."""

    name: str
    a: float
    b: float
    inner: float
    gap: float

    @property
    def relative(self) -> float:
        """||A - B||_F / ||A||_F; infinite where A is zero and B is not."""
        if self.a > 0:
            return math.sqrt(max(self.gap, 0.0) / self.a)
        return math.inf if self.b > 0 else 0.0

    @property
    def cosine(self) -> float | None:
        """<A, B> / (||A|| ||B||); None where one of them is zero."""
        return self.inner / math.sqrt(self.a * self.b) if self.a > 0 and self.b > 0 else None

    @property
    def norm_ratio(self) -> float | None:
        """||B||_F / ||A||_F; None where A is zero."""
        return math.sqrt(self.b / self.a) if self.a > 0 else None


class Difference(Struct, frozen=True):
    """Every module of two adapters, and the modules only one of them has."""

    modules: tuple[ModuleDifference, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    @property
    def whole(self) -> ModuleDifference:
        """The two adapters as one long vector each."""
        sums = [sum(getattr(m, part) for m in self.modules) for part in ("a", "b", "inner", "gap")]
        return ModuleDifference("whole adapter", *sums)


def difference(a: Adapter, b: Adapter) -> Difference:
    """Compare two adapters; a module that one of them lacks counts as zero there.

    Names are taken into the vocabulary of the first. Raises IncompatibleError where counterparts
    differ in shape, none is shared, or an adapter holds NaN or Inf.
    """
    adapters = a, b = alike((a, b), a.naming)
    alignment = align(adapters, missing="zero")
    threads = resolve("cpu", "float32").threads

    def one(module: Aligned) -> ModuleDifference:
        near = _compared(adapters, module)
        numbers = (float(n) for n in (near.target, near.result, near.inner, near.error))
        return ModuleDifference(module.name, *numbers)

    with single_threaded_blas(), ThreadPoolExecutor(threads) as pool:
        modules = tuple(pool.map(one, alignment.modules))
    only = [tuple(name for name in x.modules if name not in y.modules) for x, y in ((a, b), (b, a))]
    return Difference(modules, *only)


def _compared(adapters: Sequence[Adapter], module: Aligned) -> Closeness:
    """The closeness of one module's two updates, an absent one being zero."""
    updates = [
        read_finite(adapter, module.name) if member is not None else None
        for adapter, member in zip(adapters, module.members, strict=True)
    ]
    model = next(update for update in updates if update is not None)
    zero = LowRank(A=model.A[:1] * 0, B=model.B[:, :1] * 0)
    left, right = (update if update is not None else zero for update in updates)
    return compare(left, right)
