"""The files of an adapter on disk."""

from pathlib import Path

from loramerge.errors import AdapterError, listed
from loramerge.io._files import (
    CARD,
    CONFIG,
    PICKLES,
    SUFFIX,
    TEXT_LIMIT,
    TOKENIZER,
    USUAL,
    WEIGHTS,
    Found,
    is_own,
    is_pickle,
    licence,
    parsed,
    pick,
)
from loramerge.io._source import Source, open_source

__all__ = ["find_on_disk"]

PERMISSIONS = "check its path and permissions"


def find_on_disk(reference: str, allow_pickle: bool = False) -> Found:
    """The files of a directory, or one file with what lies beside it.

    Raises AdapterError where there are none, or no telling which, and for a pickle unless it is
    allowed.
    """
    path = Path(reference).expanduser()
    try:
        weights = _weights(path, allow_pickle) if path.is_dir() else path
        if not weights.exists():
            raise AdapterError(f"{reference} does not exist.", _elsewhere(reference))
    except OSError as error:
        raise AdapterError(f"{reference} cannot be read: {error.strerror}.", PERMISSIONS) from None
    pickled = weights.suffix in PICKLES
    if pickled and not allow_pickle:
        raise is_pickle(weights)
    source = _unpickled(weights) if pickled else open_source(weights)
    config = _read(weights.parent / CONFIG)
    card = _read(weights.parent / CARD) if weights.name in USUAL else None
    return Found(
        source=source,
        config=parsed(weights.parent / CONFIG, config) if config is not None else None,
        beside=not is_own(weights.name),
        licence=licence(card) if card is not None else None,
        tokenizer={
            name: weights.parent / name
            for name in TOKENIZER
            if weights.name in USUAL and (weights.parent / name).is_file()
        },
    )


def _elsewhere(reference: str) -> str:
    """What may have been meant by a path that is not there."""
    first, *rest = reference.split("/")
    if len(rest) > 1 and first.strip(".~") and not Path(first).exists():
        return f"if it is on the Hub, type: {first}/{rest[0]}:{'/'.join(rest[1:])}"
    return f"see what is there: ls {Path(reference).parent}"


def _unpickled(weights: Path) -> Source:
    from loramerge.io._pickle import open_pickle  # with what opens zips, for the few who ask

    return open_pickle(weights)


def _weights(directory: Path, allow_pickle: bool) -> Path:
    """The one weights file of a directory. Raises AdapterError when there is none or no telling."""
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    if picked := pick(names, allow_pickle):
        return directory / picked
    if files := [str(directory / name) for name in names if name.endswith(SUFFIX)]:
        raise AdapterError(
            f"{directory} holds {len(files)} safetensors files: {listed(files)}.",
            f"name one of them, for example: {files[0]}",
        )
    for suffix in PICKLES:
        if pickles := [name for name in names if name.endswith(suffix)]:
            return directory / pickles[0]
    deeper = sorted(directory.glob(f"*/{WEIGHTS}"))
    raise AdapterError(
        f"{directory} holds no adapter: no {WEIGHTS} and no other {SUFFIX} file.",
        f"name the directory that does, for example: {deeper[0].parent}"
        if deeper
        else f"name the directory that holds {CONFIG}",
    )


def _read(path: Path) -> bytes | None:
    """The text that lies with a weights file, no longer than anybody reads; None without one."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            return file.read(TEXT_LIMIT + 1)
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror}.", PERMISSIONS) from None
