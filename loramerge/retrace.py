"""The way of a result, from its record: its sources found again, each step on it made again."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from msgspec import Struct
from msgspec.structs import replace

from loramerge.adapter import Adapter
from loramerge.conversion import SINGLE, plan_conversion
from loramerge.converted import convert
from loramerge.engine import file_sha256
from loramerge.errors import IncompatibleError, LoramergeError
from loramerge.events import Listener
from loramerge.io._open import open_adapter
from loramerge.io._reference import hub_reference
from loramerge.needs import recorded_needs
from loramerge.origin import Origin
from loramerge.plan import make_plan
from loramerge.publish import compute_into
from loramerge.recipe import Named, make_recipe
from loramerge.record import Record, Source
from loramerge.record import source as recorded
from loramerge.translation import CONVERT

__all__ = ["Made", "Remade", "Way", "retrace"]

# Between the parts of a name on the Hub, of which the last is that of a copy: user/repo:folder.
HUB_NAME = re.compile("[/:]")
SEARCH = "name the directories that hold its sources with --sources DIR"


class Made(Protocol):
    """What is told of a computed file, whichever way it was made."""

    @property
    def tensors_sha256(self) -> str:
        """The hash over all its tensors."""

    @property
    def device(self) -> str:
        """The device that computed it."""

    @property
    def machine(self) -> str:
        """The kind of machine."""

    @property
    def versions(self) -> Mapping[str, str]:
        """What computed it, by distribution."""

    def as_json(self) -> dict[str, Any]:
        """What stands beside the weights."""


class Remade(Struct, frozen=True):
    """A result made again; `files` is where, a directory or one file."""

    adapter: Adapter
    made: Made
    files: Path


class Way(Struct, frozen=True):
    """A record with each of its sources found, or to be made again from a record of its own."""

    record: Record
    found: tuple["Adapter | Way", ...]

    def adapters(self) -> Iterator[Adapter]:
        """Every source that is there."""
        for one in self.found:
            yield from one.adapters() if isinstance(one, Way) else [one]

    def walk(self, directory: Path, device: str, listen: Listener) -> Remade:
        """Make the result again, below a directory; sources that are gone first.

        Raises IncompatibleError where a source turns out to have changed.
        """
        directory.mkdir()
        inputs: list[Adapter] = []
        for place, (known, one) in enumerate(zip(self.record.sources, self.found, strict=True)):
            if isinstance(one, Way):
                below = one.walk(directory / str(place), device, listen)
                inputs.append(replace(below.adapter, reference=known.name))
            else:
                inputs.append(_as_recorded(one, known))
        if self.record.recipe.method == CONVERT:
            return self._converted(inputs[0], directory, listen)
        return self._computed(inputs, directory, device, listen)

    def _computed(
        self, inputs: list[Adapter], directory: Path, device: str, listen: Listener
    ) -> Remade:
        canonical = self.record.recipe
        facts = zip(inputs, canonical.weights, canonical.alphas, strict=True)
        named = [Named(adapter.reference, weight, alpha) for adapter, weight, alpha in facts]
        values = {**canonical.options, **canonical.settings, "device": device}
        given = {key: value for key, value in values.items() if value is not None}
        plan = make_plan(make_recipe(canonical.method, named, given), inputs)
        files = directory / "result"
        files.mkdir()
        report = compute_into(plan, files, files.name, listen)
        self._check(report.sources_sha256)
        return Remade(open_adapter(str(files / plan.layout.weights)), report, files)

    def _converted(self, adapter: Adapter, directory: Path, listen: Listener) -> Remade:
        options = self.record.recipe.options
        extras = "error" if options.get("extras") == "carry" else "drop"
        files = directory / f"result{SINGLE if options.get('single') else ''}"
        needs = recorded_needs(options)
        to = str(options.get("to"))
        plan = plan_conversion(adapter, to, str(files), extras=extras, needs=needs)
        done = convert(plan, listen)
        self._check([done.source_sha256])
        return Remade(open_adapter(str(files)), done, files)

    def _check(self, sources_sha256: Sequence[str]) -> None:
        """Raise IncompatibleError for sources whose bytes are not the recorded ones."""
        pairs = zip(self.record.sources, sources_sha256, self.found, strict=True)
        wrong = [
            _drift(source, str(source.reference or source.name), sha256)
            for source, sha256, one in pairs
            if not isinstance(one, Way) and sha256 != source.sha256
        ]
        if wrong:
            raise IncompatibleError(f"It cannot be made again: {'; '.join(wrong)}.", SEARCH)


def _as_recorded(adapter: Adapter, known: Source) -> Adapter:
    """A source under its recorded name: here it may have another, or be a copy of one on the Hub.

    What a copy has beside it is not carried, as it was not from the Hub.
    """
    if adapter.origin is not None:
        return adapter
    place = None if known.reference is None else hub_reference(known.reference)
    if place is None:
        return replace(adapter, reference=known.name)
    texts = tuple(adapter.tokenizer)
    origin = Origin(place.repository, str(place.revision), place.path, tokenizer=texts)
    return replace(adapter, origin=origin, tokenizer={})


def _drift(source: Source, where: str, sha256: str) -> str:
    return f"{where} has the sha256 {sha256}, {source.name} had {source.sha256}"


def retrace(record: Record, output: str, places: Sequence[Path], allow_pickle: bool = False) -> Way:
    """Find every source of `output` in places or on the Hub, or else what it was made from.

    Raises IncompatibleError that names all sources which are not there or have changed, or where a
    source is no file but what followed from a base model.
    """
    search = _Search(list(dict.fromkeys(places)), allow_pickle)
    way = search.way(record, None)
    if search.derived:
        name, words = search.derived[0]
        then = "" if name else f" && loramerge diff again {shlex.quote(output)}"
        raise IncompatibleError(
            f"{name or output} cannot be made again from its record, which does not hold the "
            "sha256 of the second model that it was made from.",
            f"type: {shlex.join(['loramerge', *words, '-o', name or 'again'])}{then}",
        )
    if search.problems:
        raise IncompatibleError(
            f"{output} cannot be made again: {'; '.join(search.problems)}.", SEARCH
        )
    return way


class _Search:
    """Looks for sources in places, and collects which are not there or have changed."""

    def __init__(self, places: Sequence[Path], allow_pickle: bool) -> None:
        self.places = places
        self.allow_pickle = allow_pickle
        self.problems: list[str] = []
        self.derived: list[tuple[str | None, list[str]]] = []

    def way(self, record: Record, name: str | None) -> Way:
        """Every source of a record: as it is, or else to be made again; of a result of a `name`."""
        found: list[Adapter | Way] = []
        for source, alpha in zip(record.sources, record.recipe.alphas, strict=True):
            if source.derived:
                self.derived.append((name, [*source.derived, *_bounds(record)]))
            elif (one := self._one(source, alpha)) is not None:
                found.append(one)
        return Way(record, tuple(found))

    def _one(self, source: Source, alpha: float | None) -> Adapter | Way | None:
        drifts: list[str] = []
        for path in dict.fromkeys(self._candidates(source)):
            adapter = self._opened(str(path), alpha, source.layout)
            if adapter is None:
                continue
            if (sha256 := file_sha256(adapter.source)) != source.sha256:
                if path.name == source.name:
                    drifts.append(_drift(source, str(path), sha256))
            elif recorded(adapter).config_sha256 != source.config_sha256:
                drifts.append(f"{path} has another adapter_config.json than {source.name} had")
            else:
                return adapter
        if source.reference is not None:
            return self._open(source.reference, alpha, source.layout)
        if source.made is not None:
            return self.way(source.made, source.name)
        gone = f"{source.name} (sha256 {source.sha256}) is not there"
        self.problems.append(" and ".join(drifts) or gone)
        return None

    def _candidates(self, source: Source) -> Iterator[Path]:
        """What has the recorded name, or that of a copy from the Hub, then files of that size."""
        for place in self.places:
            named = [place / source.name, *([place] if place.name == source.name else [])]
            named += [place / HUB_NAME.split(source.name)[-1]] if source.reference else []
            yield from (path for path in named if path.exists())
        for place in self.places:
            for pattern in ("*.safetensors", "*/*.safetensors"):
                for file in sorted(place.glob(pattern)):
                    if file.stat().st_size == source.bytes:
                        yield file

    def _opened(self, path: str, alpha: float | None, layout: str | None) -> Adapter | None:
        """An adapter, where a path is one."""
        try:
            return self._open(path, alpha, layout)
        except LoramergeError:
            return None

    def _open(self, reference: str, alpha: float | None, layout: str | None) -> Adapter:
        return open_adapter(reference, alpha, named=layout, allow_pickle=self.allow_pickle)


def _bounds(record: Record) -> list[str]:
    """What is typed besides for an adapter that follows from a base model."""
    recipe = record.recipe
    if recipe.method == CONVERT:
        said = [word for a in recipe.alphas if a for word in ("--alpha", f"{a:.17g}")]
        return ["--to", str(recipe.options.get("to")), *said, *recorded_needs(recipe.options).typed]
    dtype = recipe.settings.get("save_dtype", "auto")
    stored = [] if dtype == "auto" else ["--save-dtype", dtype]
    return ["--rank", str(recipe.settings.get("rank")), *stored]
