"""What must be counted over the whole adapter before a method can merge any module."""

from collections.abc import Sequence
from concurrent.futures import Executor
from threading import Lock
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from loramerge.adapter import Updates
from loramerge.align import Aligned
from loramerge.batches import batches
from loramerge.compute import Compute
from loramerge.events import Listener, Started
from loramerge.linalg.calibrations import prepared
from loramerge.plan import Plan
from loramerge.reading import read_updates, seen_by
from loramerge.registry import Census
from loramerge.solve import halving
from loramerge.workers import each

__all__ = ["take"]


def take(plans: Sequence[Plan], compute: Compute, pool: Executor, listen: Listener) -> list[Any]:
    """What the census of each plan's method finds; None where its options need none.

    The plans are of the same modules: each pass reads them once, for all that still count.
    """
    every = [_Count(plan) for plan in plans]
    for done in range(max(plan.counts for plan in plans)):
        _pass([one for one in every if one.plan.counts > done], compute, pool, listen)
    return [one.known for one in every]


def _pass(counts: Sequence["_Count"], compute: Compute, pool: Executor, listen: Listener) -> None:
    first = counts[0].plan

    def count(batch: Sequence[Aligned]) -> list[list[Any]]:
        updates = read_updates(first, compute, batch)
        return [[one.count(updates, batch) for one in counts]]

    def work(batch: Sequence[Aligned]) -> tuple[()]:
        for found in halving(count, compute, batch):
            for one, number in zip(counts, found, strict=True):
                one.add(number)
        return ()

    listen(Started("counting", len(first.alignment.modules)))
    each(pool, work, batches([one.plan for one in counts], compute), listen)
    for one in counts:
        one.settle()


class _Count(Struct):
    """One census: a sum that grows from any thread, no more than one count for each being held."""

    plan: Plan
    known: Any = None
    total: Any = None
    lock: Lock = field(default_factory=Lock)

    @property
    def census(self) -> Census:
        census = self.plan.recipe.method.census
        assert census is not None
        return census

    def count(self, updates: Updates, batch: Sequence[Aligned]) -> Any:
        """What a batch adds."""
        seen = replace(seen_by(self.plan, updates, batch), known=self.known)
        seen = prepared(self.plan.recipe.merge.calibrate, seen)
        return self.census.count(seen, self.plan.options)

    def add(self, count: Any) -> None:
        """Add one."""
        with self.lock:
            self.total = count if self.total is None else self.total + count

    def settle(self) -> None:
        """What follows from the sum, for the next pass or the merge."""
        self.known, self.total = self.census.settle(self.total, self.plan.options, self.known), None
