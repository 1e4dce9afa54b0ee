"""Tensors out of a PyTorch pickle (.bin, .pt), where that is allowed: no code of it runs.

torch.load(weights_only=True) builds tensors and containers of them, and nothing else. It unpacks
any zip, though, and a compressed one of 390 kB becomes 400 MB: so the zip is looked at first, and
must hold no more than the file is long.
"""

import json
import zipfile
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO

from loramerge._lazy import torch
from loramerge.errors import AdapterError, listed
from loramerge.io._header import DTYPE_BYTES, parse, shown
from loramerge.io._pickle_header import Outlined, outlines
from loramerge.io._source import Handle, OnDisk, Source

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_name", "open_pickle", "outlines", "pickle_source", "unpickled"]

# What trainers save beside an adapter: objects of theirs, or the state of a run.
NO_ADAPTER = frozenset(
    ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth")
)
DTYPES = {
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"},
    **{"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"},
}
AGAIN = "save it as .safetensors: model.save_pretrained(..., safe_serialization=True)"
SAVE_AGAIN = "save it again with torch.save, which writes a plain zip of plain tensors"


def open_pickle(path: Path) -> Source:
    """Open and check a pickle; its tensors are in memory from then on, its bytes on disk.

    Raises AdapterError for one that holds something else than tensors by name, and for a zip that
    torch would not have written.
    """
    check_name(path)
    handle = Unpickled(path)
    return pickle_source(path, handle, handle.size, handle.outlines)


def check_name(path: PurePath) -> None:
    """Raise AdapterError for what a trainer saves beside an adapter."""
    if path.name in NO_ADAPTER:
        raise AdapterError(
            f"{path} is the state of a training run, no adapter.", "name the file with the weights"
        )


def pickle_source(
    path: Path,
    handle: Handle,
    size: int,
    outlines: Mapping[str, Outlined],
    unread: list[str] | None = None,
) -> Source:
    """A pickle of `size` bytes as if its tensors stood behind it, one after the other."""
    stops = accumulate(one.nbytes for one in outlines.values())
    header = {
        key: {
            "dtype": one.dtype,
            "shape": list(one.shape),
            "data_offsets": [stop - one.nbytes, stop],
        }
        for (key, one), stop in zip(outlines.items(), stops, strict=True)
    }
    total = sum(one.nbytes for one in outlines.values())
    tensors, metadata = parse(path, json.dumps(header).encode(), total)
    return Source(path, handle, size, size, tensors, metadata, unread)


def unpickled(path: Path, expected: Mapping[str, Outlined]) -> "Unpickled":
    """An open pickle. Raises AdapterError where its tensors are not those that are expected."""
    handle = Unpickled(path)
    if list(handle.outlines.items()) != list(expected.items()):
        raise AdapterError(
            f"{path} holds other tensors than its beginning says.",
            "no program writes such a file: do not use it",
        )
    return handle


class Unpickled(OnDisk):
    """The bytes of the file, and after its end those of the tensors in it, one after the other."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with path.open("rb") as file:
            _check_zip(path, file)
            file.seek(0)
            self.tensors = _tensors(path, file, self.size)
        self.outlines = {
            key: Outlined(_dtype(path, key, tensor), tuple(tensor.shape))
            for key, tensor in self.tensors.items()
        }
        self.stops = list(accumulate(one.nbytes for one in self.outlines.values()))

    def read_at(self, count: int, start: int) -> bytes:
        """Up to `count` bytes from `start` on, of the file or of one tensor."""
        if start < self.size:
            return super().read_at(min(count, self.size - start), start)
        place = bisect_right(self.stops, start - self.size)
        tensor = list(self.tensors.values())[place]
        begin = start - self.size - (self.stops[place] - tensor.nbytes)
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        return flat[begin : begin + count].numpy().tobytes()


def _check_zip(path: Path, file: BinaryIO) -> None:
    """Raise AdapterError unless it is a zip as torch writes one: stored, plain names, no larger."""
    try:
        with zipfile.ZipFile(file) as opened:
            entries = opened.infolist()
    except (zipfile.BadZipFile, ValueError, OSError):
        raise AdapterError(
            f"{path} is no zip of tensors, but a pickle of before PyTorch 1.6, or damaged.", AGAIN
        ) from None
    size = path.stat().st_size
    if packed := [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED]:
        raise AdapterError(
            f"{path} is compressed ({listed([shown(name) for name in packed], 2)}), as torch "
            "never saves; it may be far larger than it looks.",
            SAVE_AGAIN,
        )
    if sum(entry.file_size for entry in entries) > size:
        raise AdapterError(f"{path} states more bytes than its {size:,}.", SAVE_AGAIN)
    names = [entry.filename for entry in entries]
    strange = [
        name
        for name in names
        if not name.isprintable() or name.startswith("/") or ".." in PurePosixPath(name).parts
    ]
    if strange or len(set(names)) < len(names):
        raise AdapterError(
            f"{path} names its parts as no program does: {listed([shown(n) for n in names], 3)}.",
            SAVE_AGAIN,
        )


def _tensors(path: Path, file: BinaryIO, size: int) -> "dict[str, Tensor]":
    """What is stored, by name."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for what it refuses
        first = shown(str(error).partition("\n")[0])
        raise AdapterError(
            f"{path} holds more than tensors, or is damaged; torch says: {first}", AGAIN
        ) from None
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise AdapterError(f"{path} holds no tensors by name, but a {type(found).__name__}.", AGAIN)
    others = [shown(key) for key, value in found.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise AdapterError(f"{path} holds more than tensors: {listed(others, 3)}.", AGAIN)
    for key, tensor in found.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise AdapterError(f"{path}: {shown(key)} is no plain tensor.", SAVE_AGAIN)
        if tensor.nbytes > size:
            raise AdapterError(
                f"{path}: {shown(key)} repeats numbers: {list(tensor.shape)} is more than the file "
                "holds.",
                SAVE_AGAIN,
            )
    return {key: tensor.detach() for key, tensor in found.items()}


def _dtype(path: Path, key: str, tensor: "Tensor") -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    if DTYPES.get(name) not in DTYPE_BYTES:
        raise AdapterError(
            f"{path} stores '{shown(key)}' as {name}, which no adapter is.",
            "convert it to bfloat16 with the tool that made it",
        )
    return DTYPES[name]
