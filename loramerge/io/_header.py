"""The header of a safetensors file, checked before anything trusts it; no torch, no numpy.

Stricter than the safetensors library, which accepts duplicate keys, absurd shapes and control
characters in names: all seen in the wild or in attacks.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loramerge.adapter import TensorInfo
from loramerge.errors import AdapterError, listed

__all__ = ["DTYPE_BYTES", "header_length", "parse", "shown"]

# In the order in which the safetensors library puts them into a file.
DTYPE_BYTES = {
    **dict.fromkeys(("U64", "I64", "F64"), 8),
    **dict.fromkeys(("F32", "U32", "I32"), 4),
    **dict.fromkeys(("BF16", "F16", "U16", "I16"), 2),
    **dict.fromkeys(("F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1),
}
# Far above any adapter seen (300k modules would need 60 MB), far below what exhausts memory.
MAX_HEADER = 25_000_000
MAX_TENSORS = 200_000
MAX_NAME = 1024
MAX_DIMENSIONS = 8
MAX_SIZE = 2**31
# What describes a tensor.
ENTRY = ("dtype", "shape", "data_offsets")

AGAIN = "download it again"
REWRITE = "write the file again with the safetensors library"
ON_TRUST = "convert it on a machine you trust with it: safetensors.torch.save_file(torch.load(...))"
UNGATHERED = "gather the weights before saving: zero_to_fp32.py, or FSDP's full state dict"

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
        "name it .bin, and --allow-pickle reads the tensors in it and runs nothing",
    ),
    (b"\x80", "is a pickle, which can run code when it is opened", ON_TRUST),
    (
        b"<",
        "is a web page (HTML), probably saved from a login or error page",
        "download the file itself, for example with: hf download",
    ),
    (b"{", "is a JSON text, not a safetensors file", "name the .safetensors file or its directory"),
)


def header_length(path: Path, start: bytes, size: int) -> int:
    """The length the first eight bytes of a file state, if a header follows.

    `start` is how the file begins, `size` its length in bytes. Raises AdapterError naming what the
    file is instead, or what of it is missing.
    """
    if size == 0:
        raise AdapterError(f"{path} is empty.", AGAIN)
    length = int.from_bytes(start[:8], "little")
    # A header of 640 bytes begins like a pickle, one of 15392 like a web page: the brace decides.
    if size >= 8 and start[8:9] == b"{" and length <= MAX_HEADER:
        if length > size - 8:
            raise AdapterError(
                f"{path} is truncated inside its header: {length + 8 - size:,} bytes of it are "
                "missing, and all tensors.",
                AGAIN,
            )
        return length
    for magic, what, hint in IMPOSTORS:
        if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(magic):
            raise AdapterError(f"{path} {what}.", hint)
    if size >= 8 and MAX_HEADER < length <= size - 8:
        raise AdapterError(
            f"{path} has a header of {length:,} bytes; the limit is {MAX_HEADER:,}.", REWRITE
        )
    begins = start[:16].decode("ascii", "replace")
    what = f"has {size} bytes" if size < 8 else f"begins with '{shown(begins)}'"
    if size >= 8 and 0 < length <= size - 8:
        what = f"has a header that begins with '{shown(start[8:9].decode('ascii', 'replace'))}'"
    raise AdapterError(f"{path} is not a safetensors file: it {what}.", "name a .safetensors file")


def parse(path: Path, text: bytes, data: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of a header that `data` bytes of tensors follow.

    Raises AdapterError for a header no well-formed file has.
    """
    header = _json(path, text)
    metadata = _metadata(path, header.pop("__metadata__", None))
    if not header:
        but = ", but metadata" if metadata else ""
        raise AdapterError(f"{path} holds no tensors{but}.", "save the adapter again")
    if len(header) > MAX_TENSORS:
        raise AdapterError(
            f"{path} names {len(header):,} tensors; the limit is {MAX_TENSORS:,}.",
            "fuse the experts of a mixture into fewer tensors, or split the file",
        )
    tensors = {key: _entry(path, key, value) for key, value in header.items()}
    _check_extents(path, tensors, data)
    if empty := [key for key, info in tensors.items() if 0 in info.shape]:
        raise AdapterError(
            f"{path} holds {len(empty)} empty tensors ({listed(empty, 3)}), as DeepSpeed ZeRO-3 "
            "and FSDP save them before gathering.",
            UNGATHERED,
        )
    return tensors, metadata


def shown(name: object) -> str:
    """A name from a file as a message may print it: escaped and cut."""
    cut = str(name)[:80]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def _json(path: Path, text: bytes) -> dict[str, Any]:
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            counts = Counter(name for name, _ in pairs)
            twice.extend(shown(name) for name, count in counts.items() if count > 1)
        return found

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        reasons = {
            UnicodeDecodeError: "UTF-8",
            RecursionError: "JSON of a depth one can read",
        }
        raise AdapterError(
            f"{path} is no readable safetensors file: its header is not "
            f"{reasons.get(type(error), 'JSON')}.",
            AGAIN,
        ) from None
    if twice:
        raise AdapterError(f"{path} names these keys twice: {listed(twice)}.", REWRITE)
    return dict(header)


def _metadata(path: Path, found: Any) -> dict[str, str]:
    metadata = {} if found is None else found
    if not isinstance(metadata, dict):
        raise AdapterError(f"{path} has metadata that is no object.", REWRITE)
    for key, text in metadata.items():
        if not isinstance(text, str):
            raise AdapterError(f"{path} has metadata that is not text: {shown(key)}.", REWRITE)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise AdapterError(
                f"{path} has metadata with half a character, which cannot be printed or written: "
                f"{shown(key)}.",
                REWRITE,
            ) from None
    return metadata


def _entry(path: Path, key: str, value: Any) -> TensorInfo:
    if not key or len(key) > MAX_NAME or not key.isprintable():
        raise AdapterError(f"{path} has an unusable tensor name: '{shown(key)}'.", REWRITE)
    if (problem := _problem(value)) is not None:
        raise AdapterError(
            f"{path} describes tensor '{shown(key)}' in a way that makes no sense: {problem}.",
            REWRITE,
        )
    dtype, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    if dtype not in DTYPE_BYTES:
        raise AdapterError(
            f"{path} stores '{shown(key)}' as {shown(dtype)}, a dtype loramerge does not know.",
            "convert it to bfloat16 with the tool that made it",
        )
    if math.prod(shape) * DTYPE_BYTES[dtype] != stop - start:
        raise AdapterError(
            f"{path}: '{shown(key)}' has {stop - start} bytes, not {list(shape)} {dtype}.", AGAIN
        )
    return TensorInfo(dtype, shape, start, stop)


def _problem(entry: Any) -> str | None:
    """What is wrong with the description of a tensor, before its numbers are compared."""
    if not isinstance(entry, dict):
        return "it is no object"
    if missing := [name for name in ENTRY if name not in entry]:
        return f"it has no {' and no '.join(missing)}"
    if not isinstance(entry["dtype"], str):
        return "its dtype is no text"
    for name in ENTRY[1:]:
        numbers = entry[name]
        if not isinstance(numbers, list) or any(type(number) is not int for number in numbers):
            return f"its {name} is no list of whole numbers"
        if any(number < 0 for number in numbers):
            return f"its {name} has a number below zero"
    if len(entry["shape"]) > MAX_DIMENSIONS:
        return f"it has {len(entry['shape'])} dimensions"
    if any(size >= MAX_SIZE for size in entry["shape"]):
        return f"it has a dimension of {max(entry['shape']):,}"
    return None if len(entry["data_offsets"]) == 2 else "its data_offsets are not two"


def _check_extents(path: Path, tensors: Mapping[str, TensorInfo], data: int) -> None:
    end = 0
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.stop)):
        if info.start != end:
            how = "overlap" if info.start < end else "leave holes between them"
            raise AdapterError(f"{path} is damaged: its tensors {how}.", AGAIN)
        end = info.stop
    if end > data:
        raise AdapterError(
            f"{path} is truncated: {end - data:,} of {end:,} bytes are missing.", AGAIN
        )
    if end < data:
        raise AdapterError(f"{path} has {data - end:,} bytes after its last tensor.", AGAIN)
