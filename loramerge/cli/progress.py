"""A progress bar on stderr: on a terminal only, and only when work takes longer than a second."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from loramerge.events import Event, Listener, Started, silent

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["progress"]

# Seconds; work shorter than this shows no bar.
PATIENCE = 1.0


@contextmanager
def progress(quiet: bool) -> Iterator[Listener]:
    """A listener that draws a bar once work has taken a second."""
    if quiet or not sys.stderr.isatty():
        yield silent
        return
    bar = _Bar()
    try:
        yield bar.hear
    finally:
        bar.stop()


class _Bar:
    """A rich progress bar that is imported and drawn only when it is needed.

    It is drawn after a second even where nothing is heard, as of a Hub that does not answer; a
    stage of unknown length only moves.
    """

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.stage, self.total, self.done = "", 0, 0
        self.drawn: Progress | None = None
        self.task: TaskID | None = None
        self.lock = threading.RLock()
        self.timer = threading.Timer(PATIENCE, self._draw)
        self.timer.daemon = True
        self.timer.start()

    def hear(self, event: Event) -> None:
        """Count, and draw when it has become worth it."""
        with self.lock:
            if isinstance(event, Started):
                self._begin(event)
                return
            self.done += event.count
            if self.drawn is None and time.monotonic() - self.began > PATIENCE:
                self._draw()
            if self.drawn is not None and self.task is not None:
                self.drawn.update(self.task, completed=min(self.done, self.total))

    def _begin(self, event: Started) -> None:
        if self.drawn is not None and self.task is not None and not self.total:
            self.drawn.remove_task(self.task)
        self.stage, self.total, self.done = event.stage, event.total, 0
        if self.drawn is not None:
            self.task = self.drawn.add_task(self.stage, total=self.total or None)

    def _draw(self) -> None:
        from rich.console import Console
        from rich.progress import Progress

        with self.lock:
            if self.drawn is None and self.stage:
                self.drawn = Progress(console=Console(stderr=True), transient=True)
                self.task = self.drawn.add_task(
                    self.stage, total=self.total or None, completed=min(self.done, self.total)
                )
                self.drawn.start()

    def stop(self) -> None:
        """Take the bar away."""
        self.timer.cancel()
        with self.lock:
            self.stage = ""
            if self.drawn is not None:
                self.drawn.stop()
