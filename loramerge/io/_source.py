"""A safetensors file, header first and tensors on demand, read without torch or safetensors."""

import math
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from loramerge._lazy import np
from loramerge.adapter import Array, TensorInfo
from loramerge.errors import AdapterError
from loramerge.io._header import header_length, parse, shown

__all__ = [
    "FLOATS",
    "Handle",
    "Joined",
    "OnDisk",
    "Source",
    "decode",
    "joined",
    "open_source",
    "source_of",
]

# What a low-rank factor may be stored as.
FLOATS = frozenset(("F64", "F32", "F16", "BF16"))
QUANTISED = "convert the adapter to bfloat16 with the tool that quantised it"
# Linux transfers at most 2 GiB less a page at once.
ONE_READ = 1 << 30
SCALARS = {
    **{"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b"},
    **{"U64": "<Q", "U32": "<I", "U16": "<H", "U8": "<B"},
}


class Handle(Protocol):
    """The bytes of a file by position, wherever it is."""

    def read_at(self, count: int, start: int) -> bytes:
        """Up to `count` bytes from `start` on; none where the file ends before."""

    def close(self) -> None:
        """Let go of it; once is enough."""


class OnDisk:
    """An open file, closed with its last owner."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._number = -1
        try:
            # Without O_NONBLOCK a pipe would wait for its other end.
            self._number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            facts = os.fstat(self._number)
        except OSError as error:
            raise _unreadable(path, error) from None
        if not stat.S_ISREG(facts.st_mode):
            raise AdapterError(f"{path} is not a regular file.", "save it to disk first")
        self.size = facts.st_size

    def read_at(self, count: int, start: int) -> bytes:
        """Up to `count` bytes from `start` on. Raises AdapterError where the system refuses."""
        try:
            return os.pread(self._number, count, start)
        except OSError as error:
            raise _unreadable(self.path, error) from None

    def close(self) -> None:
        """Close it; once is enough."""
        number, self._number = self._number, -1
        if number >= 0:
            os.close(number)

    def __del__(self) -> None:
        self.close()


class Source(Struct, frozen=True):
    """An open safetensors file: header known, tensors read by offset, never mapped.

    Reading by offset keeps the memory of a run at what it asked for, and a file replaced while
    it is read cannot crash the process. Where only the header may be looked at, `unread` collects
    the keys whose numbers were asked for all the same.
    """

    path: Path
    handle: Handle
    data_start: int
    size: int
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    unread: list[str] | None = None

    def read(self, key: str) -> bytes:
        """The stored bytes of one tensor. Raises AdapterError where the file no longer has them."""
        info = self.tensors[key]
        start, left, pieces = self.data_start + info.start, info.nbytes, []
        while left:
            piece = self.handle.read_at(min(left, ONE_READ), start)
            if not piece:
                raise AdapterError(f"{self.path} was shortened while it was read.", "run it again")
            pieces.append(piece)
            start, left = start + len(piece), left - len(piece)
        return b"".join(pieces)

    def array(self, key: str) -> Array:
        """One tensor as a float32 array (float64 if stored so), in its stored shape.

        Raises AdapterError for a dtype that holds no plain floating-point numbers.
        """
        info = self.tensors[key]
        return decode(self.read(key), info.dtype, key).reshape(info.shape)

    def scalar(self, key: str) -> float:
        """One stored number, from a 0-d or one-element tensor, without numpy."""
        info = self.tensors[key]
        if math.prod(info.shape) != 1 or info.dtype not in (*SCALARS, "BF16"):
            raise AdapterError(
                f"{self.path}: {shown(key)} is {info.dtype} {list(info.shape)}, not one number.",
                "save the adapter again with the tool that trained it",
            )
        return self.scalars(key)[0]

    def scalars(self, key: str) -> tuple[float, ...]:
        """A few stored numbers without numpy, ones in place of those that stay unread.

        Raises AdapterError where they are none.
        """
        info = self.tensors[key]
        if self.unread is not None:
            self.unread.append(key)
            return (1.0,) * math.prod(info.shape)
        data = self.read(key)
        if info.dtype == "BF16":
            halves = [data[place : place + 2] for place in range(0, len(data), 2)]
            return tuple(struct.unpack("<f", b"\0\0" + half)[0] for half in halves)
        if info.dtype not in SCALARS:
            raise AdapterError(
                f"{self.path}: {shown(key)} is {info.dtype}, not numbers.", QUANTISED
            )
        return tuple(float(value) for (value,) in struct.iter_unpack(SCALARS[info.dtype], data))

    def chunks(self, size: int = 1 << 18) -> Iterator[bytes]:
        """The whole file from its first byte, for hashing."""
        for start in range(0, self.size, size):
            yield self.handle.read_at(size, start)

    def close(self) -> None:
        """Let go of the file."""
        self.handle.close()


class Joined(Source, frozen=True):
    """A file, and the tensors of another one that it leaves out: factors that several share."""

    other: Source | None = None

    def borrowed(self, key: str) -> bool:
        """Whether a tensor is from the other file."""
        return self.other is not None and self.other.tensors.get(key) is self.tensors[key]

    def read(self, key: str) -> bytes:
        """The stored bytes of one tensor, wherever it is."""
        if self.other is not None and self.borrowed(key):
            return self.other.read(key)
        return Source.read(self, key)


def joined(source: Source, other: Source) -> Joined:
    """A file with what it lacks of another."""
    tensors = {**other.tensors, **source.tensors}
    facts = (source.path, source.handle, source.data_start, source.size)
    return Joined(*facts, tensors, source.metadata, source.unread, other)


def open_source(path: Path) -> Source:
    """Open and check a safetensors file; only its header is read.

    Raises AdapterError with one sentence for everything that is not a well-formed file.
    """
    handle = OnDisk(path)
    try:
        return source_of(path, handle, handle.size)
    except AdapterError:
        handle.close()  # who keeps the error keeps no file open
        raise


def source_of(path: Path, handle: Handle, size: int, look: bool = False) -> Source:
    """The checked header of a file of `size` bytes; `path` is what messages call it.

    To `look` is to leave all tensors unread.
    """
    length = header_length(path, handle.read_at(64, 0), size)
    tensors, metadata = parse(path, handle.read_at(length, 8), size - 8 - length)
    return Source(path, handle, 8 + length, size, tensors, metadata, [] if look else None)


def decode(data: bytes | memoryview, dtype: str, key: str) -> Array:
    """Stored bytes as a flat float array. bfloat16 by bit shift: numpy has none."""
    if dtype == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return np.frombuffer(data, np.float16).astype(np.float32)
    if dtype in ("F32", "F64"):
        return np.frombuffer(data, np.float32 if dtype == "F32" else np.float64)
    raise AdapterError(
        f"{shown(key)} is stored as {dtype}; low-rank factors must be F64, F32, F16 or BF16.",
        QUANTISED,
    )


def _unreadable(path: Path, error: OSError) -> AdapterError:
    reason = error.strerror or str(error)
    return AdapterError(f"{path} cannot be read: {reason}.", f"look at it: ls -l {path}")
