"""A weights file on the Hub, of which the start is at hand."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from loramerge.errors import HubError
from loramerge.events import Listener, silent
from loramerge.io._files import CARD, CONFIG
from loramerge.io._hub_errors import explained
from loramerge.io._source import OnDisk

if TYPE_CHECKING:
    from loramerge.io._hub import Repository

__all__ = ["OnHub", "beside_of"]


class OnHub:
    """A weights file on the Hub: its start is at hand, the rest when something of it is read.

    `opened` is how what was downloaded is opened.
    """

    def __init__(
        self,
        repository: "Repository",
        path: str,
        head: bytes,
        size: int,
        opened: Callable[[Path], OnDisk] = OnDisk,
    ) -> None:
        self.repository, self.path, self.size = repository, path, size
        self._head, self._opened = head, opened
        self._whole: OnDisk | None = None
        self._lock = threading.Lock()

    def read_at(self, count: int, start: int) -> bytes:
        """Up to `count` bytes from `start` on. Raises HubError where they cannot be had."""
        stop = min(start + count, self.size)
        if stop <= len(self._head):
            return self._head[start:stop]
        return self.fetch(silent).read_at(count, start)

    @property
    def missing(self) -> int:
        """Bytes to download before tensors can be read."""
        return 0 if self._whole else self.size

    def fetch(self, listen: Listener) -> OnDisk:
        """The file in the cache, downloaded now if it is not there, with what lies beside it."""
        repository = self.repository
        with self._lock, explained(str(repository.asked), repository.asked.repository):
            if self._whole is None:
                for path in (beside_of(self.path, CONFIG), CARD):
                    if path in repository.files:
                        repository.download(path, silent)
                whole = self._opened(repository.download(self.path, listen))
                if whole.size != self.size:
                    raise HubError(
                        f"{whole.path} has {whole.size:,} bytes, not the {self.size:,} of the Hub.",
                        f"delete it and type it again: rm {whole.path}",
                    )
                self._whole = whole
            return self._whole

    def close(self) -> None:
        """Let go of what was downloaded; it stays in the cache."""
        if self._whole is not None:
            self._whole.close()


def beside_of(path: str, name: str) -> str:
    """A file of that name in the same folder."""
    return path[: path.rfind("/") + 1] + name
