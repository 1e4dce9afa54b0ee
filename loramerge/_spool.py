"""Results that wait for a number over the whole adapter: kept in a file, not in memory."""

import os
import tempfile
from threading import Lock
from types import TracebackType

from loramerge._lazy import np
from loramerge.adapter import LowRank

__all__ = ["Spool"]


class Spool:
    """An anonymous temporary file of low-rank updates, written and read from any thread."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="loramerge-")  # noqa: SIM115 - closed by __exit__
        self._end = 0
        self._lock = Lock()
        self._places: dict[str, tuple[int, LowRank]] = {}

    def __enter__(self) -> "Spool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def put(self, name: str, update: LowRank) -> None:
        """Keep one module's result."""
        A, B = np.ascontiguousarray(update.A), np.ascontiguousarray(update.B)
        with self._lock:
            start = self._end
            self._end += A.nbytes + B.nbytes
        os.pwrite(self._file.fileno(), A.data, start)
        os.pwrite(self._file.fileno(), B.data, start + A.nbytes)
        shape = LowRank(np.empty((0, *A.shape), A.dtype), np.empty((0, *B.shape), B.dtype))
        self._places[name] = (start, shape)

    def get(self, name: str) -> LowRank:
        """One module's result back."""
        start, shape = self._places[name]
        A = self._array(shape.A.shape[1:], shape.A.dtype, start)
        return LowRank(A, self._array(shape.B.shape[1:], shape.B.dtype, start + A.nbytes))

    def _array(
        self, shape: tuple[int, ...], dtype: "np.dtype[np.generic]", start: int
    ) -> "np.ndarray[tuple[int, ...], np.dtype[np.generic]]":
        count = int(np.prod(shape)) * dtype.itemsize
        return np.frombuffer(os.pread(self._file.fileno(), count, start), dtype).reshape(shape)
