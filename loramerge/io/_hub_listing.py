"""Which weights file of a repository a reference means, from the names of its files alone."""

from collections.abc import Collection

from loramerge.errors import AdapterError, HubError, listed
from loramerge.io._files import PICKLES, SUFFIX, WEIGHTS, is_pickle, pick
from loramerge.io._reference import HubReference
from loramerge.options import did_you_mean

__all__ = ["weights_among"]

ONE_OF_THEM = "name one of them, for example: {}"


def weights_among(
    files: Collection[str], reference: HubReference, allow_pickle: bool = False
) -> str:
    """The path of the one weights file that is meant.

    Raises HubError where the path of the reference is not there, AdapterError with the exact
    references to type where there are several adapters, or with what there is instead of one, and
    for a pickle unless it is allowed.
    """
    asked = reference.path
    if asked in files:
        return _single(asked, reference, allow_pickle)
    folder = f"{asked}/" if asked else ""
    inside = sorted(path for path in files if path.startswith(folder))
    if not inside:
        raise HubError(f"{reference}: there is no such file or folder.", _close(files, reference))
    here = [path for path in inside if "/" not in path.removeprefix(folder)]
    if picked := pick((path.removeprefix(folder) for path in here), allow_pickle):
        return folder + picked
    if several := [path for path in here if path.endswith(SUFFIX)]:
        raise _ambiguous(f"{len(several)} safetensors files", several, reference)
    if deeper := _places(inside):
        raise _ambiguous(f"no adapter itself, but {len(deeper)} further down", deeper, reference)
    for suffix in PICKLES:
        if pickles := [path for path in here if path.endswith(suffix)]:
            raise is_pickle(reference.at(pickles[0]))
    raise AdapterError(
        f"{reference} holds no adapter: no {WEIGHTS} and no other {SUFFIX} file.",
        f"it holds: {listed(inside, 4)}",
    )


def _single(path: str, reference: HubReference, allow_pickle: bool) -> str:
    """A file that was named."""
    if path.endswith(PICKLES):
        if allow_pickle:
            return path
        raise is_pickle(reference)
    if not path.endswith(SUFFIX):
        raise AdapterError(f"{reference} is no {SUFFIX} file.", f"try: {reference.at('')}")
    return path


def _places(inside: list[str]) -> list[str]:
    """Folders that hold one adapter, and files that lie with others: what a reference can name."""
    folders: dict[str, list[str]] = {}
    for path in inside:
        folder, _, name = path.rpartition("/")
        folders.setdefault(folder, []).append(name)
    places: list[str] = []
    for folder, names in folders.items():
        if pick(names):
            places.append(folder)
        else:
            places += [f"{folder}/{name}" for name in names if name.endswith(SUFFIX)]
    return places


def _ambiguous(what: str, paths: list[str], reference: HubReference) -> AdapterError:
    named = [str(reference.at(path)) for path in paths]
    return AdapterError(f"{reference} holds {what}: {listed(named)}.", ONE_OF_THEM.format(named[0]))


def _close(files: Collection[str], reference: HubReference) -> str:
    """What may have been meant by a path that is not there."""
    weights = [path for path in files if path.endswith(SUFFIX)]
    known = sorted({*weights, *(path.rpartition("/")[0] for path in weights)} - {""})
    close = did_you_mean(reference.path, known)
    if close:
        return f"did you mean '{reference.at(close)}'?"
    return f"try: {reference.at(known[0] if known else '')}"
