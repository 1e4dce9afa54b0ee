"""Work on many modules or files at once, by threads."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future, as_completed
from threading import Lock, Thread
from typing import TypeVar

from loramerge.events import Advanced, Listener

__all__ = ["each", "side_by_side"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(
    pool: Executor,
    work: Callable[[Sequence[Item]], Sequence[Result]],
    batches: Iterable[Sequence[Item]],
    listen: Listener,
) -> list[Result]:
    """Results in any order, as soon as they are there; the first failure cancels the rest."""
    pending = {pool.submit(work, batch): len(batch) for batch in batches}
    found: list[Result] = []
    try:
        for future in as_completed(pending):
            found += future.result()
            listen(Advanced(pending[future]))
    finally:
        for future in pending:
            future.cancel()
    return found


def side_by_side(
    work: Callable[[Item], Result], items: Sequence[Item], threads: int
) -> list[Result]:
    """Results, in order, of work that waits for a network: an interrupt does not wait with it.

    The first failure is raised, and nothing more is begun. A single item is done at once.
    """
    if len(items) == 1:
        return [work(items[0])]
    futures: list[Future[Result]] = [Future() for _ in items]
    waiting, lock = list(zip(items, futures, strict=True))[::-1], Lock()

    def one_after_another() -> None:
        while True:
            with lock:
                if not waiting:
                    return
                item, future = waiting.pop()
            try:
                future.set_result(work(item))
            except BaseException as error:
                future.set_exception(error)

    for _ in range(min(threads, len(items))):
        Thread(target=one_after_another, daemon=True).start()
    try:
        return [future.result() for future in futures]
    finally:
        with lock:
            waiting.clear()
