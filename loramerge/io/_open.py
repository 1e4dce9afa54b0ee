"""From what a user typed to an Adapter: find the files, tell the layout, read the header."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from loramerge.adapter import Adapter, source_name
from loramerge.errors import AdapterError, UsageError, listed
from loramerge.io._disk import find_on_disk
from loramerge.io._files import Found
from loramerge.io._foreign import recognise, samples
from loramerge.io._hub import find_on_hub
from loramerge.io._layout import Given, Layout
from loramerge.io._reference import HubReference, hub_reference
from loramerge.io._source import Joined, Source, joined
from loramerge.options import did_you_mean
from loramerge.registry import layout_names, load

__all__ = ["is_unread", "layout", "layouts", "on_hub", "open_adapter", "written_as"]

# What most adapters are, so that the other layouts need not be loaded.
USUAL = "peft"


def layouts() -> list[Layout]:
    """Every layout, by name."""
    return [load(name).LAYOUT for name in layout_names()]


def layout(name: str) -> Layout:
    """One layout. Raises UsageError naming the closest, or all."""
    if name not in layout_names():
        close = did_you_mean(name, layout_names())
        raise UsageError(
            f"There is no layout '{name}'.",
            f"did you mean '{close}'?" if close else f"one of: {', '.join(layout_names())}",
        )
    found: Layout = load(name).LAYOUT
    return found


def written_as(adapter: Adapter) -> str:
    """The layout in which results of an adapter are written."""
    return layout(adapter.layout).writes or adapter.layout


def open_adapter(
    reference: str,
    alpha: float | None = None,
    *,
    look: bool = False,
    named: str | None = None,
    allow_pickle: bool = False,
    shared: str | None = None,
) -> Adapter:
    """Open a directory, a .safetensors file or a reference to the Hub; a path that exists wins.

    Only headers and configs are read. A file on the Hub is downloaded when a tensor of it is read,
    which reading the alphas of some layouts is; to `look` is to leave them unread. The layout is
    told from the keys, unless it is `named`. A pickle is refused unless it is allowed. Factors that
    the file leaves out are taken from the one that is `shared`. Raises AdapterError with the reason
    for anything that is not a readable adapter, HubError where the Hub does not give it.
    """
    files = _find(reference, look, allow_pickle)
    if shared is not None:
        files = _completed(files, _find(shared, look, allow_pickle), reference, shared)
    if named is None:
        found = _detect(files.source, reference, files.config if not files.beside else None)
    else:
        found = _named(named, files.source, reference)
    try:
        adapter = found.read(Given(reference, files.source, files.config, files.beside, alpha))
    except AdapterError as error:
        if reference in error.message:
            raise
        raise AdapterError(f"{reference}: {error.message}", error.hint) from None
    if isinstance(files.source, Joined):
        adapter = _own(adapter, files.source, str(shared))
    if files.source.unread:
        adapter = _unscaled(adapter)
    elif files.source.unread is not None:  # nothing was missed: a source like any other
        adapter = replace(adapter, source=replace(files.source, unread=None))
    return replace(
        adapter,
        alpha=alpha,
        named=named,
        origin=files.origin,
        licence=files.licence,
        tokenizer=files.tokenizer,
    )


def _find(reference: str, look: bool, allow_pickle: bool) -> Found:
    """The files of an adapter, here or on the Hub."""
    place = on_hub(reference)
    if place is None:
        return find_on_disk(reference, allow_pickle)
    return find_on_hub(place, look, allow_pickle)


def _completed(files: Found, other: Found, reference: str, shared: str) -> Found:
    """The files of an adapter with what they leave out of others."""
    source = joined(files.source, other.source)
    if len(source.tensors) == len(files.source.tensors):
        raise UsageError(f"{shared} holds no tensor that {reference} lacks.", "leave --shared out")
    config, beside = files.config, files.beside
    if config is None:
        config, beside = other.config, other.beside
    return replace(files, source=source, config=config, beside=beside)


def _own(adapter: Adapter, source: Joined, shared: str) -> Adapter:
    """The adapter without modules and extras that only the other file has."""
    modules = {
        name: module
        for name, module in adapter.modules.items()
        if not all(map(source.borrowed, module.keys.values()))
    }
    used = {key for module in modules.values() for key in module.keys.values()}
    tensors = {k: v for k, v in source.tensors.items() if k in used or not source.borrowed(k)}
    return replace(
        adapter,
        modules=modules,
        extras=tuple(extra for extra in adapter.extras if not source.borrowed(extra.key)),
        source=replace(source, tensors=tensors),
        derived=("convert", source_name(adapter), "--shared", Path(shared).name),
    )


def on_hub(reference: str) -> HubReference | None:
    """The place on the Hub that a reference means; None for a path, or what can only be one.

    A path that exists wins, even one that the system refuses to look at.
    """
    try:
        here = Path(reference).expanduser().exists()
    except OSError:
        here = True
    return None if here else hub_reference(reference)


def is_unread(adapter: Adapter) -> bool:
    """Whether it was only looked at, and its scales are in tensors that were left unread."""
    return isinstance(adapter.source, Source) and bool(adapter.source.unread)


def _unscaled(adapter: Adapter) -> Adapter:
    """The adapter with scales that are no numbers: those the layout saw stood for unread ones."""
    modules = {name: replace(m, scaling=math.nan) for name, m in adapter.modules.items()}
    note = "its alphas or gates are stored as tensors, which stay unread until it is downloaded"
    return replace(adapter, modules=modules, assumed=(note,))


def _named(name: str, source: Source, reference: str) -> Layout:
    """The layout the user says a file is in. Raises AdapterError for keys it does not explain."""
    found = layout(name)
    if left := [key for key in source.tensors if not found.explains(key)]:
        raise AdapterError(
            f"{reference} is not in the {name} layout, which does not explain {listed(left, 4)}.",
            "leave --from out, and the layout is told from the keys",
        )
    return found


def _detect(source: Source, reference: str, config: Mapping[str, Any] | None) -> Layout:
    """The one layout that explains every key; `config` is the file's own."""
    keys = samples(source.tensors)
    if all(map((usual := layout(USUAL)).owns, keys)):
        return usual
    for found in layouts():
        if any(found.marks(key) for key in keys):
            return _explained(found, source, reference)
    if config is not None and config.get("peft_type", "LORA") != "LORA":
        return layout("peft")  # which refuses it by its type
    if foreign := recognise(keys):
        raise AdapterError(
            f"{reference} is in the {foreign.name} layout, which loramerge does not read yet.",
            foreign.hint,
        )
    unexplained = {
        found.name: sum(not found.explains(key) for key in keys)
        for found in layouts()
        if not found.marked
    }
    closest = layout(min(unexplained, key=lambda name: unexplained[name]))
    return _explained(closest, source, reference)


def _explained(found: Layout, source: Source, reference: str) -> Layout:
    """The layout, which must explain every key. Raises AdapterError naming those it does not."""
    left = [key for key in source.tensors if not found.explains(key)]
    if not left:
        return found
    if len(left) == len(source.tensors):
        raise AdapterError(
            f"{reference} is no LoRA in a layout loramerge knows; it holds {listed(left, 3)}.",
            "see: loramerge layouts",
        )
    raise AdapterError(
        f"{reference} looks like {found.name}, but these keys are not explained: "
        f"{listed(left, 4)}.",
        "remove them from the file, or name the file they belong to",
    )
