"""What must be counted over the whole adapter before a method can merge any module."""

from collections.abc import Sequence
from concurrent.futures import Executor
from threading import Lock
from typing import Any

from msgspec.structs import replace

from loramerge.align import Aligned
from loramerge.compute import Compute
from loramerge.events import Listener, Started
from loramerge.plan import Plan
from loramerge.reading import read_updates
from loramerge.registry import Census
from loramerge.solve import batches, halving
from loramerge.workers import counted, each

__all__ = ["take"]


def take(plan: Plan, compute: Compute, pool: Executor, listen: Listener) -> Any:
    """What the method's census finds, pass after pass; None where its options need none."""
    census, known = plan.recipe.method.census, None
    for _ in range(plan.counts):
        assert census is not None
        known = _pass(plan, census, known, compute, pool, listen)
    return known


def _pass(
    plan: Plan, census: Census, known: Any, compute: Compute, pool: Executor, listen: Listener
) -> Any:
    total = _Sum()

    def count(batch: Sequence[Aligned]) -> list[Any]:
        updates = replace(read_updates(plan, compute, batch), known=known)
        return [census.count(updates, plan.options)]

    def work(batch: Sequence[Aligned]) -> None:
        for one in halving(count, compute, batch):
            total.add(one)

    listen(Started("counting", len(plan.alignment.modules)))
    each(pool, work, list(batches(plan, compute.batch)), counted(listen, compute))
    return census.settle(total.value, plan.options, known)


class _Sum:
    """A sum that grows from any thread, so that no more than one count for each is held."""

    def __init__(self) -> None:
        self.value: Any = None
        self._lock = Lock()

    def add(self, count: Any) -> None:
        """Add one."""
        with self._lock:
            self.value = count if self.value is None else self.value + count
