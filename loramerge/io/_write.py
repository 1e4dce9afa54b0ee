"""Writing safetensors files: deterministic bytes, any order, and all or nothing."""

import ctypes
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from loramerge.errors import OutputError
from loramerge.io._header import DTYPE_BYTES
from loramerge.io._layout import Stored, Written

__all__ = ["TensorWriter", "file_size", "header", "staged", "start_file", "write_text"]

ALIGNMENT = 8
SINGLE = ".safetensors"
# What tells that a directory holds an adapter, so that --force may replace it.
OURS = frozenset(("adapter_config.json", "adapter_model.safetensors", "loramerge.json"))


class TensorWriter(Struct, frozen=True):
    """An open safetensors file whose header is written: tensors follow in any order, any thread."""

    descriptor: int
    written: Written
    data_start: int
    offsets: Mapping[str, tuple[int, int]]

    def write(self, key: str, data: bytes | memoryview) -> None:
        """Put one tensor's bytes where the header says they are."""
        start, stop = self.offsets[key]
        if len(data) != stop - start:
            raise AssertionError(f"{key}: {len(data)} bytes for {stop - start}")
        _pwrite(self.descriptor, data, self.data_start + start)

    def restate(self, metadata: Mapping[str, str]) -> None:
        """Write the header again with what is known only now, as long as what stood for it."""
        head, _ = header(replace(self.written, metadata={**self.written.metadata, **metadata}))
        if len(head) != self.data_start:
            raise AssertionError(f"a header of {len(head)} bytes for {self.data_start}")
        _pwrite(self.descriptor, head, 0)


def start_file(descriptor: int, written: Written) -> TensorWriter:
    """Write the header into an empty file."""
    head, offsets = header(written)
    _pwrite(descriptor, head, 0)
    end = max((stop for _, stop in offsets.values()), default=0)
    os.ftruncate(descriptor, len(head) + end)
    return TensorWriter(descriptor, written, len(head), offsets)


def _pwrite(descriptor: int, data: bytes | memoryview, position: int) -> None:
    """All of it: one call may write less, on a disk that is nearly full for example."""
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, position)
        position, view = position + count, view[count:]


def file_size(written: Written) -> int:
    """Bytes of the file a Written becomes."""
    head, offsets = header(written)
    return len(head) + max((stop for _, stop in offsets.values()), default=0)


def nbytes(stored: Stored) -> int:
    """Bytes of one tensor."""
    total = DTYPE_BYTES[stored.dtype]
    for size in stored.shape:
        total *= size
    return total


def header(written: Written) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Header bytes and offsets: by dtype, wide ones first, then by name, as in the library."""
    # Half a surrogate pair, from a path that is no text, would make the file unreadable elsewhere.
    facts = {key: text.encode(errors="replace").decode() for key, text in written.metadata.items()}
    entries: dict[str, object] = {"__metadata__": dict(sorted(facts.items()))}
    offsets: dict[str, tuple[int, int]] = {}
    end = 0
    places = {dtype: place for place, dtype in enumerate(DTYPE_BYTES)}
    for stored in sorted(written.tensors, key=lambda tensor: (places[tensor.dtype], tensor.key)):
        if stored.key in offsets:
            raise AssertionError(f"{stored.key} is written twice")
        offsets[stored.key] = (end, end + nbytes(stored))
        end = offsets[stored.key][1]
        entries[stored.key] = {
            "dtype": stored.dtype,
            "shape": stored.shape,
            "data_offsets": offsets[stored.key],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, offsets


@contextmanager
def staged(final: Path, force: bool) -> Iterator[Path]:
    """A temporary sibling directory that becomes `final` if the block succeeds, or vanishes.

    What the block leaves in the directory takes the place of `final`: the directory itself, or,
    where `final` names a .safetensors file, the one file of that name inside. A killed run leaves
    nothing at `final` and a sibling that no later run stumbles over. Raises OutputError.
    """
    check_free(final, force)
    with _reported(final):
        final = final.absolute()
        new = [parent for parent in final.parents if not parent.exists()]
        temporary = final.parent / f".{final.name[:100]}.{os.urandom(4).hex()}.tmp"
        try:
            temporary.mkdir(parents=True)
            yield temporary
            made = temporary / final.name if final.suffix == SINGLE else temporary
            for path in [*temporary.iterdir(), temporary]:
                _sync(path)
            check_free(final, force)
            _put(made, final)
            _sync(final.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            for parent in new:
                with suppress(OSError):
                    parent.rmdir()  # keeps one that holds something: the result


def check_text(path: Path, force: bool) -> None:
    """Raise OutputError where a text file is there already, or no directory for it."""
    if path.exists() and not force:
        raise OutputError(f"{path} exists.", "use --force to replace it, or choose another name")
    if path.is_dir() or not path.parent.is_dir():
        raise OutputError(f"{path} cannot be written.", "choose a file in a directory that exists")


def write_text(path: Path, text: str, force: bool) -> None:
    """Write a text file, whole or not at all. Raises OutputError where one is there already."""
    check_text(path, force)
    with _reported(path):
        temporary = path.with_name(f".{path.name[:100]}.{os.urandom(4).hex()}.tmp")
        try:
            temporary.write_text(text, "utf-8", errors="surrogateescape")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _reported(final: Path) -> Iterator[None]:
    """What the system refuses while an output is written, as OutputError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise OutputError(
            f"{final} cannot be written: {error.strerror or error}.",
            "free some space, or choose another disk" if full else "choose another place",
        ) from error


def check_free(final: Path, force: bool) -> None:
    """Raise OutputError where something stands at the output that is not to be replaced.

    --force replaces a file by a file, and a directory by a directory only if it holds an adapter.
    """
    with _reported(final):
        _check_free(final, force)


def _check_free(final: Path, force: bool) -> None:
    if not (final.exists() or final.is_symlink()):
        return
    if not force:
        raise OutputError(f"{final} exists.", "use --force to replace it, or choose another name")
    if final.is_dir() != (final.suffix != SINGLE):
        kind = "directory" if final.is_dir() else "file"
        raise OutputError(f"{final} is a {kind}; it will not be replaced.", "choose another place")
    if not final.is_dir():
        return
    if Path.cwd().is_relative_to(final.resolve()):
        raise OutputError(f"{final} is the current directory or above it.", "choose another place")
    found = {path.name for path in final.iterdir()}
    if found and not found & OURS:
        raise OutputError(
            f"{final} is a directory that holds no adapter; it will not be replaced.",
            "choose another place",
        )


def _put(made: Path, final: Path) -> None:
    """Move into place. A directory that stood there is exchanged and removed as the temporary."""
    if not final.is_dir() or final.is_symlink():
        if final.is_symlink() and made.is_dir():
            final.unlink()
        made.replace(final)
        return
    if _exchange(made, final):
        return
    aside = made.with_name(made.name + ".old")
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
