"""Make a result again from its own record, and judge whether it is the same."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from loramerge.adapter import Adapter
from loramerge.compute import resolve
from loramerge.engine import file_sha256
from loramerge.errors import AdapterError, GateError, IncompatibleError, LoramergeError, UsageError
from loramerge.events import Listener, silent
from loramerge.io._hub import fetch
from loramerge.io._open import open_adapter
from loramerge.plan import Plan, make_plan
from loramerge.publish import PROVENANCE, destination
from loramerge.recipe import Named, make_recipe
from loramerge.record import Record, Source, made
from loramerge.record import source as recorded
from loramerge.report import Report
from loramerge.result import Result, compute
from loramerge.verdict import Measured, Verdict, digest_of, judge

__all__ = ["reproduce"]


def reproduce(
    output: str,
    places: Sequence[Path] = (),
    out: str | None = None,
    force: bool = False,
    device: str | None = None,
    listen: Listener = silent,
    allow_pickle: bool = False,
) -> Verdict:
    """Make `output` again from the sources it names, and compare; `out` is where to keep it.

    Sources are looked for by name and by sha256 beside the output and in `places`, or on the Hub at
    the recorded revision. Raises AdapterError without a record, IncompatibleError where sources
    have changed or are not there, GateError where the result differs by more than it may: at all
    on the same kind of machine with the same versions, else by 1 unit in the last place of the
    stored dtype and by 1e-6 of a delta weight.
    """
    there = open_adapter(output)
    record, lost = made(there)
    if record is None:
        raise AdapterError(
            f"{output} does not say how it was made: {lost or 'there is no record in its header'}.",
            "only files that loramerge has written can be made again",
        )
    measured = _measured(there, output)
    digest = digest_of(there.source)
    if measured is not None and measured.tensors_sha256 != digest:
        raise GateError(
            f"{output} holds other tensors than its {PROVENANCE} tells of.",
            "it was changed after it was made: get it again from where it came",
        )
    search = _Search([Path(output).expanduser().resolve().parent, *places], allow_pickle)
    tree = search.located(record)
    if search.problems:
        raise IncompatibleError(
            f"{output} cannot be made again: {'; '.join(search.problems)}.",
            "name the directories that hold its sources with --sources DIR",
        )
    fetch(tree.adapters(), listen)
    used = _device(device, measured)
    plan, kept = tree.plan(used, listen)
    if out is not None:
        destination(plan, out, force)
    result, report = compute(plan, listen)
    del kept
    if wrong := tree.drifted(report):
        raise IncompatibleError(f"{output} cannot be made again: {'; '.join(wrong)}.", None)
    if out is not None:
        result.save(out, force)
    return judge(output, there, digest, measured, result.adapter, report)


def _measured(there: Adapter, output: str) -> Measured | None:
    """What stands beside the weights of a directory; None for a single file."""
    path = there.source.path.parent / PROVENANCE
    if not (Path(output).expanduser().is_dir() or there.origin) or not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Measured)
    except msgspec.MsgspecError as error:
        raise AdapterError(f"{path} is no record of a result: {error}.", "get it again") from None


def _device(asked: str | None, measured: Measured | None) -> str:
    """The device asked for, or the recorded one where there is such a device."""
    if asked is not None or measured is None:
        return asked or "auto"
    try:
        return resolve(measured.device, "float32", 0).device
    except UsageError:
        return "cpu"


@dataclass(frozen=True, slots=True)
class _Tree:
    """A record with each of its sources found, or to be made again from a record of its own."""

    record: Record
    found: tuple["Adapter | _Tree", ...]

    def adapters(self) -> Iterator[Adapter]:
        for one in self.found:
            yield from one.adapters() if isinstance(one, _Tree) else [one]

    def plan(self, device: str, listen: Listener) -> tuple[Plan, list[Result]]:
        """The plan of the recorded recipe; sources are made again on the way, and to be kept."""
        inputs: list[Adapter] = []
        kept: list[Result] = []
        for known, one in zip(self.record.sources, self.found, strict=True):
            if isinstance(one, _Tree):
                plan, below = one.plan(device, listen)
                result, report = compute(plan, listen)
                if wrong := one.drifted(report):
                    raise IncompatibleError(f"{known.name}: {'; '.join(wrong)}.", None)
                kept += [*below, result]
                inputs.append(replace(result.adapter, reference=known.name))
            else:
                inputs.append(one)
        canonical = self.record.recipe
        facts = zip(inputs, canonical.weights, canonical.alphas, strict=True)
        named = [Named(adapter.reference, weight, alpha) for adapter, weight, alpha in facts]
        values = {**canonical.options, **canonical.settings, "device": device}
        recipe = make_recipe(
            canonical.method, named, {key: v for key, v in values.items() if v is not None}
        )
        return make_plan(recipe, inputs), kept

    def drifted(self, report: Report) -> list[str]:
        """Sources from the Hub whose bytes are not the recorded ones."""
        pairs = zip(self.record.sources, report.sources_sha256, self.found, strict=True)
        return [
            _drift(source, str(source.reference or source.name), sha256)
            for source, sha256, one in pairs
            if not isinstance(one, _Tree) and sha256 != source.sha256
        ]


def _drift(source: Source, where: str, sha256: str) -> str:
    return f"{where} has the sha256 {sha256}, {source.name} had {source.sha256}"


class _Search:
    """Looks for sources in places, and collects which are not there or have changed."""

    def __init__(self, places: Sequence[Path], allow_pickle: bool) -> None:
        self.places = places
        self.allow_pickle = allow_pickle
        self.problems: list[str] = []

    def located(self, record: Record) -> _Tree:
        """Every source of a record: as it is, or else to be made again."""
        alphas = record.recipe.alphas
        found = (self._one(s, a) for s, a in zip(record.sources, alphas, strict=True))
        return _Tree(record, tuple(one for one in found if one is not None))

    def _one(self, source: Source, alpha: float | None) -> Adapter | _Tree | None:
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
            elif recorded(adapter).name != source.name:
                return replace(adapter, reference=source.name)
            else:
                return adapter
        if source.reference is not None:
            return self._open(source.reference, alpha, source.layout)
        if source.made is not None:
            return self.located(source.made)
        gone = f"{source.name} (sha256 {source.sha256}) is not there"
        self.problems.append(" and ".join(drifts) or gone)
        return None

    def _candidates(self, source: Source) -> Iterator[Path]:
        """What has the recorded name, then files of the recorded size."""
        for place in self.places:
            named = [place / source.name, *([place] if place.name == source.name else [])]
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
