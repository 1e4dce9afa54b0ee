"""The file of a result: each module written, read back as stored, and measured."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeAlias

from loramerge._lazy import np
from loramerge.adapter import LowRank
from loramerge.align import Aligned
from loramerge.compute import encode, finite
from loramerge.errors import IncompatibleError, OutputError, listed
from loramerge.io._layout import Part, Stored, Written
from loramerge.io._source import decode, open_source
from loramerge.io._write import start_file
from loramerge.linalg.factors import compare, pad, revived
from loramerge.plan import Plan
from loramerge.reading import key_of
from loramerge.record import KEY, tensors_sha256
from loramerge.report import ModuleReport
from loramerge.solve import Target, read_target

__all__ = ["Output", "terms"]

if TYPE_CHECKING:
    Encoded: TypeAlias = "np.typing.NDArray[Any]"
else:
    Encoded: TypeAlias = object

# Folding weights and scales into float32 factors costs some 4e-8; an error up to this is measured
# against the sum in float64.
FOLDING = 1e-6


class Output:
    """An output file being filled, in any order and from any thread."""

    def __init__(self, plan: Plan, ranks: Mapping[str, int], path: Path) -> None:
        self.plan = plan
        self.ranks = ranks
        self.path = path
        draft = plan.draft(ranks)
        self.written: Written = plan.written(ranks)
        self._modules = {module.name: module for module in draft.modules}
        self._digests: dict[str, str] = {}
        self._stored = {
            (module, s.part): s for s in self.written.tensors if s.part for module in s.modules
        }
        self._waiting: dict[str, dict[str, Encoded]] = {}
        self._lock = Lock()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._writer = start_file(self._descriptor, self.written)
        for stored in self.written.tensors:
            if stored.part is None:
                self._put(stored, stored.content())

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
            A, B = self._part(module.name, "A", update.A), self._part(module.name, "B", update.B)
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

    def close(self, pool: Executor, sources_sha256: Sequence[str]) -> str:
        """Complete the header, read the whole file back, compare; sha256 over all tensors.

        Raises OutputError where a tensor reads back different.
        """
        metadata = {KEY: self.plan.record(sources_sha256).text()}
        if self.written.seal is not None:
            metadata |= self.written.seal(self.written, open_source(self.path))
        self._writer.restate(metadata)
        source = open_source(self.path)
        keys = sorted(source.tensors)
        found = pool.map(lambda key: hashlib.sha256(source.read(key)).hexdigest(), keys)
        os.fsync(self._descriptor)  # the disk is busy while the pool reads back
        self.let_go()
        wrong = [
            key for key, digest in zip(keys, found, strict=True) if digest != self._digests[key]
        ]
        source.close()
        if wrong or len(keys) != len(self.written.tensors):
            raise OutputError(
                f"{self.path.name} reads back wrong: {listed(wrong)}.", "check the disk"
            )
        return tensors_sha256(source.tensors, self._digests)

    def let_go(self) -> None:
        """Close the file, whole or not."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _part(self, module: str, part: Part, values: Encoded) -> Encoded:
        """Write one factor; returned as a reader will find it.

        Where a tensor holds several modules, it is written with the last of them.
        """
        stored = self._stored[module, part]
        encoded = encode(values, stored.dtype)
        with self._lock:
            waiting = self._waiting.setdefault(stored.key, {})
            waiting[module] = encoded
            complete = len(waiting) == len(stored.modules)
            if complete:
                del self._waiting[stored.key]
        if complete:
            joined = stored.join([waiting[name] for name in stored.modules])
            self._put(stored, np.ascontiguousarray(joined).data.cast("B"))
        return decode(encoded.data.cast("B"), stored.dtype, stored.key).reshape(values.shape)

    def _put(self, stored: Stored, data: bytes | memoryview) -> None:
        self._writer.write(stored.key, data)
        self._digests[stored.key] = hashlib.sha256(data).hexdigest()


def terms(update: LowRank) -> int:
    """How many rank-1 terms are not zero."""
    return int(np.count_nonzero(update.A.any(axis=-1) & update.B.any(axis=-2)))


def _holds_numbers(target: Target) -> bool:
    """Whether the sum is finite; where its Gram matrices are, no further look is needed."""
    known = target.known
    sound = known is not None and bool(np.isfinite(known.A.sum() + known.B.sum()))
    return sound or finite(target.update)
