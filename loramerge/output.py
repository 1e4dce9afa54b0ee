"""The file of a result: each module written, read back as stored, and measured."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path

from loramerge._lazy import np
from loramerge.adapter import LowRank
from loramerge.align import Aligned
from loramerge.compute import finite
from loramerge.errors import IncompatibleError
from loramerge.filling import Filling
from loramerge.io._layout import Written
from loramerge.linalg.factors import compare, pad, revived
from loramerge.linalg.kernels import namespace
from loramerge.linalg.spectrum import columnwise
from loramerge.plan import Plan
from loramerge.reading import key_of
from loramerge.record import KEY
from loramerge.report import ModuleReport
from loramerge.solve import Target, read_target

__all__ = ["Output", "terms"]

# Folding weights and scales into float32 factors costs some 4e-8; an error up to this is measured
# against the sum in float64.
FOLDING = 1e-6
# Entries of a term that are looked at first: nearly always they say that it is not zero.
GLANCE = 8


class Output:
    """An output file being filled, in any order and from any thread."""

    def __init__(self, plan: Plan, ranks: Mapping[str, int], path: Path) -> None:
        self.plan = plan
        self.ranks = ranks
        draft = plan.draft(ranks)
        self.written: Written = plan.written(ranks)
        self._modules = {module.name: module for module in draft.modules}
        self._file = Filling(self.written, path)

    def emit(
        self,
        module: Aligned,
        update: LowRank,
        target: Target | None = None,
        condition: float | None = None,
    ) -> ModuleReport:
        """Write one module and measure it, as stored, against the exact weighted sum.

        Where the sum is not at hand it is read again. `condition` is the method's own, for the
        report.
        """
        target = target or read_target(self.plan, module)
        rank, stored_rank = terms(update), 0
        if self.ranks[module.name] > 0:
            stored = self._modules[module.name]
            stored_rank, root = stored.rank, stored.scaling**0.5
            update = pad(update, stored_rank)
            if self.plan.options.trains_on:
                key = key_of(self.plan.recipe.settings.seed, 0, module.name)
                update = revived(update, key)
            if root != 1:
                update = LowRank(update.A / root, update.B / root)
            A = self._file.put(module.name, "A", update.A)
            B = self._file.put(module.name, "B", update.B)
            update = LowRank(A * root, B * root) if root != 1 else LowRank(A, B)
        if not (_holds_numbers(target) and finite(update)):
            raise IncompatibleError(
                f"{module.name} overflows {self.plan.dtype}.",
                "use smaller weights, or store more with --save-dtype float32",
            )
        near = compare(target.update, update, target.known)
        if float(near.error) <= FOLDING**2 * float(near.target):
            near = compare(read_target(self.plan, module, wide=True).update, update)
        return ModuleReport(
            module.name,
            module.ranks,
            rank,
            stored_rank,
            target=float(near.target),
            result=float(near.result),
            inner=float(near.inner),
            error=float(near.error),
            condition=condition,
        )

    @property
    def not_finite(self) -> tuple[str, ...]:
        """Keys of what is carried beside the modules, and holds NaN or Inf."""
        return tuple(self._file.not_finite)

    def close(self, pool: Executor, sources_sha256: Sequence[str]) -> str:
        """Complete the header, read the whole file back, compare; sha256 over all tensors.

        Raises OutputError where a tensor reads back different.
        """
        return self._file.close({KEY: self.plan.record(sources_sha256).text()}, pool)

    def let_go(self) -> None:
        """Close the file, whole or not."""
        self._file.let_go()


def terms(update: LowRank) -> int:
    """How many rank-1 terms are not zero."""
    A, B = update.A, update.B
    if (A[:, :GLANCE].any(axis=-1) & B[:GLANCE].any(axis=-2)).all():
        return update.rank
    return int(np.count_nonzero(A.any(axis=-1) & columnwise(namespace(B).any, B)))


def _holds_numbers(target: Target) -> bool:
    """Whether the sum is finite; where its Gram matrices are, no further look is needed."""
    known = target.known
    sound = known is not None and bool(np.isfinite(known.A.sum() + known.B.sum()))
    return sound or finite(target.update)
