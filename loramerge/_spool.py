"""Results that wait for a number over the whole adapter: kept in a file, not in memory."""

import os
import tempfile
from threading import Lock
from types import TracebackType

from loramerge._lazy import np
from loramerge.adapter import Array

__all__ = ["Spool"]


class Spool:
    """An anonymous temporary file of arrays, written and read from any thread."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="loramerge-")  # noqa: SIM115 - closed by __exit__
        self._end = 0
        self._lock = Lock()
        self._places: dict[str, tuple[int, list[tuple[tuple[int, ...], np.dtype[np.generic]]]]] = {}

    def __enter__(self) -> "Spool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def put(self, name: str, *arrays: Array) -> None:
        """Keep the arrays of one module."""
        whole = [np.ascontiguousarray(array) for array in arrays]
        with self._lock:
            start = self._end
            self._end += sum(array.nbytes for array in whole)
        self._places[name] = start, [(array.shape, array.dtype) for array in whole]
        for array in whole:
            os.pwrite(self._file.fileno(), array.data, start)
            start += array.nbytes

    def get(self, name: str) -> list[Array]:
        """The arrays of one module back."""
        start, shapes = self._places[name]
        found: list[Array] = []
        for shape, dtype in shapes:
            count = int(np.prod(shape)) * dtype.itemsize
            data = os.pread(self._file.fileno(), count, start)
            found.append(np.frombuffer(data, dtype).reshape(shape))
            start += count
        return found
