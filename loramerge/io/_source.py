"""A safetensors file, header first and tensors on demand, read without torch or safetensors.

The pre-checks are stricter than the safetensors library, which accepts duplicate keys, absurd
shapes and control characters in names (formats seen in the wild and in attacks alike).
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramerge._lazy import np
from loramerge.adapter import Array, TensorInfo
from loramerge.errors import AdapterError, listed

__all__ = ["DTYPE_BYTES", "Source", "open_source", "parse_header"]

DTYPE_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
# Far above any adapter seen (300k modules would need 60 MB), far below what exhausts memory.
MAX_HEADER = 25_000_000
MAX_TENSORS = 200_000
MAX_NAME = 1024
MAX_DIMENSIONS = 8
MAX_SIZE = 2**31

# What people hand over instead of a safetensors file, by its first bytes.
IMPOSTORS: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version https://git-lfs",
        "is a Git LFS pointer, not the file it points to",
        "run: git lfs pull",
    ),
    (
        b"GGUF",
        "is a GGUF file; adapters converted for llama.cpp cannot be read back",
        "use the safetensors file it was made from",
    ),
    (
        b"PK\x03\x04",
        "is a PyTorch pickle (.bin or .pt), which can run code when it is opened",
        "convert it to safetensors on a machine you trust with it",
    ),
    (
        b"\x80\x02",
        "is a pickle, which can run code when it is opened",
        "convert it to safetensors on a machine you trust with it",
    ),
    (
        b"<",
        "is a web page (HTML), probably saved from a login or error page",
        "download the file itself, for example with: hf download",
    ),
    (b"{", "is a JSON text, not a safetensors file", "name the .safetensors file or its directory"),
)


@dataclass(frozen=True, slots=True)
class Source:
    """An open safetensors file: header known, tensors read by offset, never mapped.

    Reading by offset keeps the memory of a run at what it asked for, and a file replaced while
    it is read cannot crash the process.
    """

    path: Path
    descriptor: int
    data_start: int
    size: int
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    def read(self, key: str) -> bytes:
        """The stored bytes of one tensor."""
        info = self.tensors[key]
        data = os.pread(self.descriptor, info.nbytes, self.data_start + info.start)
        if len(data) != info.nbytes:
            raise AdapterError(f"{self.path} was shortened while it was read.", "run it again")
        return data

    def array(self, key: str) -> Array:
        """One tensor as a float32 array (float64 if stored so), in its stored shape.

        Raises AdapterError for a dtype that holds no plain floating-point numbers.
        """
        info = self.tensors[key]
        return decode(self.read(key), info.dtype, key).reshape(info.shape)

    def scalar(self, key: str) -> float:
        """One stored number, from a 0-d or one-element tensor, without numpy."""
        info = self.tensors[key]
        if math.prod(info.shape) != 1:
            raise AdapterError(f"{key} in {self.path} holds {list(info.shape)} values, not one.")
        return _scalar(self.read(key), info.dtype)

    def chunks(self, size: int = 1 << 22) -> Iterator[bytes]:
        """The whole file from its first byte, for hashing."""
        for start in range(0, self.size, size):
            yield os.pread(self.descriptor, size, start)


def decode(data: bytes, dtype: str, key: str) -> Array:
    """Stored bytes as a flat float array. bfloat16 by bit shift: numpy has none."""
    if dtype == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return np.frombuffer(data, np.float16).astype(np.float32)
    if dtype in ("F32", "F64"):
        return np.frombuffer(data, np.float32 if dtype == "F32" else np.float64)
    raise AdapterError(
        f"{key} is stored as {dtype}; low-rank factors must be F64, F32, F16 or BF16.",
        "convert the adapter to bfloat16 with the tool that quantised it",
    )


def _scalar(data: bytes, dtype: str) -> float:
    import struct

    if dtype == "BF16":
        return float(struct.unpack("<f", b"\0\0" + data)[0])
    codes = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h"}
    codes |= {"I8": "<b", "U8": "<B", "U16": "<H", "U32": "<I", "U64": "<Q"}
    if dtype not in codes:
        raise AdapterError(f"a scalar stored as {dtype} cannot be read.")
    return float(struct.unpack(codes[dtype], data)[0])


def open_source(path: Path) -> Source:
    """Open and check a safetensors file; only its header is read.

    Raises AdapterError with one sentence for everything that is not a well-formed file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise AdapterError(f"{path} cannot be opened: {error.strerror}.") from None
    try:
        size = os.fstat(descriptor).st_size
        return parse_header(path, descriptor, size)
    except BaseException:
        os.close(descriptor)
        raise


def parse_header(path: Path, descriptor: int, size: int) -> Source:
    """Read and check the header of an open file."""
    if size == 0:
        raise AdapterError(f"{path} is empty.", "download it again")
    start = os.pread(descriptor, 64, 0)
    for magic, what, hint in IMPOSTORS:
        if start.lstrip().startswith(magic):
            raise AdapterError(f"{path} {what}.", hint)
    length = int.from_bytes(start[:8], "little")
    if size < 8 or length > size - 8:
        if size >= 8 and start[8:9] == b"{":
            raise AdapterError(f"{path} is truncated inside its header.", "download it again")
        raise AdapterError(f"{path} is not a safetensors file.", "name a .safetensors file")
    if length > MAX_HEADER:
        raise AdapterError(f"{path} has a header of {length:,} bytes; the limit is {MAX_HEADER:,}.")
    header = _json(path, os.pread(descriptor, length, 8))
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise AdapterError(f"{path} has metadata that is not text.")
    if len(header) > MAX_TENSORS:
        raise AdapterError(f"{path} names {len(header):,} tensors; the limit is {MAX_TENSORS:,}.")
    tensors = {key: _entry(path, key, value) for key, value in header.items()}
    _check_extents(path, tensors, size - 8 - length)
    return Source(path, descriptor, 8 + length, size, tensors, metadata)


def _json(path: Path, text: bytes) -> dict[str, Any]:
    duplicates: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            duplicates.extend(sorted({name for name in names if names.count(name) > 1}))
        return found

    if not text.startswith(b"{"):
        raise AdapterError(f"{path} is not a safetensors file: its header is not JSON.")
    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise AdapterError(f"{path} is not a safetensors file: its header is not JSON.") from None
    if duplicates:
        raise AdapterError(f"{path} names these keys twice: {listed(duplicates)}.")
    if not isinstance(header, dict) or not header:
        raise AdapterError(f"{path} holds no tensors.")
    return header


def _entry(path: Path, key: str, value: Any) -> TensorInfo:
    printable = key.encode("unicode_escape").decode()[:80]
    if not key or len(key) > MAX_NAME or not key.isprintable():
        raise AdapterError(f"{path} has an unusable tensor name: '{printable}'.")
    try:
        dtype, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        sound = all(type(d) is int and 0 <= d < MAX_SIZE for d in (*shape,)) and all(
            type(o) is int and o >= 0 for o in (start, stop)
        )
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound or len(shape) > MAX_DIMENSIONS:
        raise AdapterError(f"{path} describes tensor '{printable}' in a way that makes no sense.")
    if dtype not in DTYPE_BYTES:
        raise AdapterError(f"{path} stores '{printable}' in the unknown dtype {dtype!s:.20}.")
    if math.prod(shape) * DTYPE_BYTES[dtype] != stop - start:
        raise AdapterError(
            f"{path}: '{printable}' has {stop - start} bytes, not {list(shape)} {dtype}."
        )
    return TensorInfo(dtype, shape, start, stop)


def _check_extents(path: Path, tensors: Mapping[str, TensorInfo], data: int) -> None:
    end = 0
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.stop)):
        if info.start != end:
            raise AdapterError(f"{path} is damaged: its tensors overlap or leave holes.")
        end = info.stop
    if end > data:
        raise AdapterError(
            f"{path} is truncated: {end - data:,} of {end:,} bytes are missing.",
            "download it again",
        )
    if end < data:
        raise AdapterError(f"{path} has {data - end:,} bytes after its last tensor.")
