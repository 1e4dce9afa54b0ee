"""Work on many modules at once, by a pool of threads, with progress told."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, as_completed
from typing import TypeVar

from loramerge.compute import Compute
from loramerge.events import Advanced, Event, Listener

__all__ = ["counted", "drained", "each"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(
    pool: Executor, work: Callable[[Item], Result], items: Sequence[Item], listen: Listener
) -> list[Result]:
    """Results in any order, as soon as they are there; the first failure cancels the rest."""
    return list(drained([pool.submit(work, item) for item in items], listen))


def drained(pending: Sequence[Future[Result]], listen: Listener) -> Iterator[Result]:
    """The results of what was submitted, as they come; whatever is left is cancelled."""
    try:
        for future in as_completed(pending):
            yield future.result()
            listen(Advanced(1))
    finally:
        for future in pending:
            future.cancel()


def counted(listen: Listener, compute: Compute) -> Listener:
    """On a GPU one item is a batch; the bar counts modules."""

    def heard(event: Event) -> None:
        listen(Advanced(compute.batch) if isinstance(event, Advanced) else event)

    return heard
