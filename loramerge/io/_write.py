"""Writing safetensors files: deterministic bytes, any order, and all or nothing."""

import ctypes
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loramerge.errors import OutputError
from loramerge.io._layout import Stored, Written
from loramerge.io._source import DTYPE_BYTES

__all__ = ["TensorWriter", "file_size", "staged"]

ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class TensorWriter:
    """An open safetensors file whose header is written: tensors follow in any order, any thread."""

    descriptor: int
    data_start: int
    offsets: Mapping[str, tuple[int, int]]

    def write(self, key: str, data: bytes | memoryview) -> None:
        """Put one tensor's bytes where the header says they are."""
        start, stop = self.offsets[key]
        if len(data) != stop - start:
            raise AssertionError(f"{key}: {len(data)} bytes for {stop - start}")
        position, view = self.data_start + start, memoryview(data)
        while view:
            count = os.pwrite(self.descriptor, view, position)
            position, view = position + count, view[count:]


def start_file(descriptor: int, written: Written) -> TensorWriter:
    """Write the header into an empty file."""
    head, offsets = _header(written)
    os.pwrite(descriptor, head, 0)
    end = max((stop for _, stop in offsets.values()), default=0)
    os.ftruncate(descriptor, len(head) + end)
    return TensorWriter(descriptor, len(head), offsets)


def file_size(written: Written) -> int:
    """Bytes of the file a Written becomes."""
    head, offsets = _header(written)
    return len(head) + max((stop for _, stop in offsets.values()), default=0)


def nbytes(stored: Stored) -> int:
    """Bytes of one tensor."""
    total = DTYPE_BYTES[stored.dtype]
    for size in stored.shape:
        total *= size
    return total


def _header(written: Written) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Header bytes and offsets: wide dtypes first, then by name, as the safetensors library."""
    header: dict[str, object] = {"__metadata__": dict(sorted(written.metadata.items()))}
    offsets: dict[str, tuple[int, int]] = {}
    end = 0
    for stored in sorted(written.tensors, key=lambda t: (-DTYPE_BYTES[t.dtype], t.key)):
        offsets[stored.key] = (end, end + nbytes(stored))
        end = offsets[stored.key][1]
        header[stored.key] = {
            "dtype": stored.dtype,
            "shape": stored.shape,
            "data_offsets": offsets[stored.key],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, offsets


@contextmanager
def staged(final: Path, force: bool) -> Iterator[Path]:
    """A temporary sibling directory that becomes `final` if the block succeeds, or vanishes.

    What the block leaves in the directory takes the place of `final`: the directory itself, or,
    where `final` names a .safetensors file, the one file of that name inside. A killed run leaves
    nothing at `final` and a sibling that no later run stumbles over.
    """
    check_free(final, force)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.parent / f".{final.name}.{secrets.token_hex(4)}.tmp"
        temporary.mkdir()
    except OSError as error:
        raise OutputError(f"{final} cannot be written: {error.strerror}.") from None
    try:
        yield temporary
        made = temporary / final.name if final.suffix == ".safetensors" else temporary
        for path in [*temporary.iterdir(), temporary]:
            _sync(path)
        _put(made, final)
        _sync(final.parent)
    except OSError as error:
        raise OutputError(f"{final} cannot be written: {error.strerror}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(final: Path, force: bool) -> None:
    """Raise OutputError where something stands at the output already."""
    if final.exists() and not force:
        raise OutputError(f"{final} exists.", "use --force to replace it, or -o for another name")
    if final.exists() and final.is_dir() != (final.suffix != ".safetensors"):
        kind = "directory" if final.is_dir() else "file"
        raise OutputError(f"{final} is a {kind}; it will not be replaced.", "choose another -o")


def _put(made: Path, final: Path) -> None:
    """Move into place. What stood there is exchanged first and removed with the temporary."""
    if not final.is_dir():
        made.replace(final)
        return
    if _exchange(made, final):
        return
    aside = made.with_suffix(".old")
    final.rename(aside)
    try:
        made.rename(final)
    except OSError:
        aside.rename(final)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(made: Path, final: Path) -> bool:
    """Swap two directories in one step where the system can (Linux renameat2)."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    at_cwd, exchange = -100, 2
    return bool(rename(at_cwd, os.fsencode(made), at_cwd, os.fsencode(final), exchange) == 0)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
