"""Adapters on the Hub: one commit, what it holds, its config, the start of its weights file.

Three requests tell all that a header holds: the listing at one commit, the config, and the start
of the weights file. That file itself comes into the Hub's cache, whole, when a tensor is read.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Self, cast

from msgspec import Struct

from loramerge._lazy import hub_errors, hub_utils, huggingface_hub
from loramerge.adapter import Adapter
from loramerge.events import Advanced, Listener, Started, silent
from loramerge.io._files import (
    CARD,
    CONFIG,
    PICKLES,
    TEXT_LIMIT,
    TOKENIZER,
    Found,
    is_own,
    licence,
    parsed,
)
from loramerge.io._header import MAX_HEADER
from loramerge.io._hub_client import client, headers, patiently
from loramerge.io._hub_errors import answered, explained
from loramerge.io._hub_file import OnHub, beside_of
from loramerge.io._hub_listing import weights_among
from loramerge.io._reference import HubReference
from loramerge.io._source import Source, open_source, source_of
from loramerge.origin import Origin
from loramerge.workers import side_by_side

if TYPE_CHECKING:
    from tqdm.auto import tqdm

__all__ = ["fetch", "find_on_hub", "look_up"]

# How much of a weights file is asked for to see its header: a floor, and a share of its size that
# headers exceed only where tensors have less than some 2 kB each. Reading stops with the header.
HEAD, SHARE = 1 << 18, 16
# No byte of a range exists.
EMPTY = 416
# Connections at a time; downloads wait for the network, not for each other.
PARALLEL = 4


class Listed(Struct, frozen=True):
    """A file as the Hub lists it: bytes, and the sha256 of one kept outside git."""

    size: int | None = None
    sha256: str | None = None


class Repository(Struct, frozen=True):
    """A repository at one commit; `name` is its own, where it was asked for by an old one."""

    asked: HubReference
    name: str
    commit: str
    files: Mapping[str, Listed]
    licence: str | None

    def cached(self, path: str) -> Path | None:
        """Where a file lies in the Hub's cache, None where it does not."""
        found = huggingface_hub.try_to_load_from_cache(
            self.asked.repository, path, revision=self.commit
        )
        return Path(found) if isinstance(found, str) else None

    def read(self, path: str) -> bytes:
        """A small file, cut where nobody reads on."""
        here = self.cached(path)
        if here is None:
            limit = TEXT_LIMIT + 1
            return patiently(lambda: self._start(path, lambda head: limit, limit))[0]
        with here.open("rb") as file:
            return file.read(TEXT_LIMIT + 1)

    def open(self, path: str, look: bool) -> Source:
        """The header of a weights file, from the cache or from afar."""
        here, place = self.cached(path), Path(str(self.asked.at(path)))
        limit = max(HEAD, (self.files[path].size or 0) // SHARE)
        if path.endswith(PICKLES):
            return self._pickle(path, here, place, limit, look)
        if here is not None:
            return open_source(here)
        head, size = patiently(lambda: self._start(path, _header, limit))
        if len(head) < min(_header(head), size):
            head, size = patiently(lambda: self._start(path, _header))
        return source_of(place, OnHub(self, path, head, size), size, look)

    def _pickle(self, path: str, here: Path | None, place: Path, limit: int, look: bool) -> Source:
        """What a pickle holds, as it begins; one that does not begin so is downloaded."""
        from loramerge.io import _pickle  # with what opens zips

        _pickle.check_name(place)
        if here is not None:
            return _pickle.open_pickle(here)
        head, size = patiently(lambda: self._start(path, lambda head: limit, limit))
        found = _pickle.outlines(head, size)
        if found is None:
            return _pickle.open_pickle(self.download(path, silent))
        handle = OnHub(self, path, b"", size, lambda file: _pickle.unpickled(file, found))
        return _pickle.pickle_source(place, handle, size, found, [] if look else None)

    def _start(
        self, path: str, needed: Callable[[bytes], int], limit: int = 8 + MAX_HEADER
    ) -> tuple[bytes, int]:
        """How a file begins, as far as its own beginning says is `needed`, and its size."""
        url = huggingface_hub.hf_hub_url(
            self.asked.repository, path, revision=self.commit, endpoint=client().endpoint
        )
        wanted = {**headers(), "Range": f"bytes=0-{limit - 1}", "Accept-Encoding": "identity"}
        head, patience = b"", huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT
        session = hub_utils.get_session()
        with session.stream("GET", url, headers=wanted, timeout=patience) as response:
            if response.status_code == EMPTY:
                return b"", 0
            hub_utils.hf_raise_for_status(response)
            whole = response.headers.get("content-range", "").rpartition("/")[2]
            size = int(whole or response.headers["content-length"])
            for piece in response.iter_bytes():
                head += piece
                if len(head) >= min(needed(head), limit):
                    break
        return head[: min(needed(head), limit)], size

    def download(self, path: str, listen: Listener) -> Path:
        """Bring a file into the cache, and where it lies there."""

        def at(revision: str) -> Path:
            return Path(
                client().hf_hub_download(
                    self.asked.repository, path, revision=revision, tqdm_class=_bar(listen)
                )
            )

        # By the name that was asked for, so that it is found by that name without a network;
        # unless the branch has moved on meanwhile.
        with suppress(hub_errors.RemoteEntryNotFoundError, hub_errors.RevisionNotFoundError):
            found = patiently(lambda: at(self.asked.revision or "main"))
            if self.commit in found.parts:
                return found
        return patiently(lambda: at(self.commit))


def _header(head: bytes) -> int:
    """Bytes that hold the header of a weights file which begins so."""
    return max(64, 8 + int.from_bytes(head[:8], "little"))


def find_on_hub(reference: HubReference, look: bool = False, allow_pickle: bool = False) -> Found:
    """The files of an adapter in a repository, all at one commit; no tensor is downloaded.

    To `look` is never to download one, but for an allowed pickle, which has no header. Raises
    HubError where the Hub does not give them, AdapterError where there are none or no telling
    which.
    """
    with explained(str(reference), reference.repository):
        found = look_up(reference)
        path = weights_among(found.files, reference, allow_pickle)
        beside = beside_of(path, CONFIG)
        config = parsed(reference.at(beside), found.read(beside)) if beside in found.files else None
        texts = tuple(name for name in TOKENIZER if beside_of(path, name) in found.files)
        return Found(
            source=found.open(path, look),
            config=config,
            beside=not is_own(path.rpartition("/")[2]),
            origin=Origin(found.name, found.commit, path, found.files[path].sha256, texts),
            licence=found.licence,
        )


def look_up(reference: HubReference) -> Repository:
    """The repository at the commit that its revision means now, or meant when last downloaded."""
    try:
        with answered():
            facts = patiently(
                lambda: client().model_info(
                    reference.repository,
                    revision=reference.revision,
                    files_metadata=True,
                    timeout=huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT,
                )
            )
    except hub_errors.OfflineModeIsEnabled:
        return _kept(reference)
    files = {
        one.rfilename: Listed(one.size, one.lfs.sha256 if one.lfs else None)
        for one in facts.siblings or ()
    }
    stated = facts.card_data.get("license") if facts.card_data else None
    terms = stated if isinstance(stated, str) else None
    return Repository(reference, facts.id, str(facts.sha), files, terms)


def _kept(reference: HubReference) -> Repository:
    """The repository as far as it is in the cache."""
    root = Path(
        huggingface_hub.snapshot_download(
            reference.repository,
            revision=reference.revision,
            local_files_only=True,
            allow_patterns=[],
        )
    )
    paths = [path for path in root.rglob("*") if path.is_file()]
    files = {path.relative_to(root).as_posix(): _listed(path) for path in paths}
    card = root / CARD
    terms = licence(card.read_bytes()[:TEXT_LIMIT]) if CARD in files else None
    return Repository(reference, reference.repository, root.name, files, terms)


def _listed(path: Path) -> Listed:
    """A file of the cache: it is a link to one that is named by its sha256, if it is large."""
    name = path.resolve().name
    return Listed(path.stat().st_size, name if len(name) == 64 else None)


def fetch(adapters: Iterable[Adapter], listen: Listener) -> None:
    """Download the weights of those adapters that are on the Hub and not yet in its cache."""
    handles = [a.source.handle for a in adapters if isinstance(a.source, Source)]
    missing = [handle for handle in handles if isinstance(handle, OnHub) and handle.missing]
    if not missing:
        return
    missing = list(dict.fromkeys(missing))
    listen(Started("downloading", sum(handle.missing for handle in missing)))
    side_by_side(lambda handle: handle.fetch(listen), missing, PARALLEL)


def _bar(listen: Listener) -> "type[tqdm[NoReturn]]":
    """What the client takes for a progress bar: it shows nothing, and tells how much has come."""

    class Bar:
        def __init__(self, **facts: object) -> None:
            self.total, self.n = facts.get("total"), facts.get("initial", 0)

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *reason: object) -> None:
            pass

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *anything, **more: None

        def update(self, n: float = 1) -> None:
            listen(Advanced(int(n)))

        def update_transfer(self, n: float) -> None:
            """Bytes on the wire, fewer than those of the file where it knows some of them."""

    return cast("type[tqdm[NoReturn]]", Bar)
