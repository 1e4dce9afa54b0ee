"""A weights file being filled with factors, module by module, and read back."""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import Executor
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeAlias

from loramerge._lazy import np
from loramerge.compute import encode, holds_numbers
from loramerge.errors import OutputError, listed
from loramerge.io._layout import Part, Stored, Written
from loramerge.io._source import decode, open_source
from loramerge.io._write import start_file
from loramerge.record import tensors_sha256

__all__ = ["Filling"]

if TYPE_CHECKING:
    Encoded: TypeAlias = "np.typing.NDArray[Any]"
else:
    Encoded: TypeAlias = object


class Filling:
    """A file whose header is written; factors follow in any order and from any thread.

    `not_finite` are the keys of what is carried beside them, and holds NaN or Inf.
    """

    def __init__(self, written: Written, path: Path) -> None:
        self.written = written
        self.path = path
        self.not_finite: list[str] = []
        self._digests: dict[str, str] = {}
        self._stored = {
            (module, s.part): s for s in written.tensors if s.part for module in s.modules
        }
        self._waiting: dict[str, dict[str, Encoded]] = {}
        self._lock = Lock()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._writer = start_file(self._descriptor, written)
        for stored in written.tensors:
            if stored.part is None:
                content = stored.content()
                if not holds_numbers(content, stored.dtype):
                    self.not_finite.append(stored.key)
                self._put(stored, content)

    def put(self, module: str, part: Part, values: Encoded) -> Encoded:
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

    def close(self, metadata: Mapping[str, str], pool: Executor) -> str:
        """Complete the header, read the whole file back, compare; sha256 over all tensors.

        Raises OutputError where a tensor reads back different.
        """
        if self.written.seal is not None:
            metadata = {**metadata, **self.written.seal(self.written, open_source(self.path))}
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

    def _put(self, stored: Stored, data: bytes | memoryview) -> None:
        self._writer.write(stored.key, data)
        self._digests[stored.key] = hashlib.sha256(data).hexdigest()
