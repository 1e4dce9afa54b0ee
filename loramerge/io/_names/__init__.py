"""Module names from one vocabulary into another, by way of diffusers' names.

A file in this folder without a leading underscore is a family of models: FAMILIES, a table of the
names of its layers. The family of an adapter is the one that explains all of its names.
"""

import importlib
import pkgutil
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache

from msgspec import Struct
from msgspec.structs import replace

from loramerge.adapter import Adapter, Module
from loramerge.errors import IncompatibleError, listed
from loramerge.io._names._forms import fits, holds, part_heights, parts, together
from loramerge.io._names._projections import Heads, Projections, in_form, like, remarks
from loramerge.io._names._table import Family, Found
from loramerge.io._names._torchtune import OF_MODEL, across_torchtune

__all__ = [
    "OF_MODEL",
    "Heads",
    "Projections",
    "alike",
    "families",
    "family_of",
    "in_form",
    "remarks",
    "renamed",
]

ONE_LAYOUT = "leave --to out, or give adapters of one layout"
# Where a file's header says what it was trained on.
ABOUT_BASE = ("modelspec.architecture", "ss_base_model_version")


@cache
def families() -> tuple[Family, ...]:
    """Every family of models, by the name of its file."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return tuple(
        family
        for name in names
        if not name.startswith("_")
        for family in importlib.import_module(f"{__name__}.{name}").FAMILIES
    )


def renamed(adapter: Adapter, naming: str, heads: Heads | None = None) -> Adapter:
    """The same adapter with module names of another vocabulary.

    Layers that are fused there are stacked, layers that are fused here are taken apart; both are
    exact. Headers do not say how many terms a part has, so factors of such layers are read. Between
    torchtune and the names of a model itself, the `heads` of queries and keys are needed.
    Raises IncompatibleError where a name has no counterpart there, listing them, and where several
    families explain all names and translate them differently.
    """
    if adapter.naming == naming:
        return adapter
    if {adapter.naming, naming} == {"torchtune", "model"}:
        return across_torchtune(adapter, naming, heads)
    if adapter.naming == "diffusers" and naming == "model":
        return _without_component(adapter)
    return _translated(adapter, naming)


def alike(adapters: Sequence[Adapter], naming: str) -> list[Adapter]:
    """Adapters with names of one vocabulary (none: each its own), and in one spelling of it.

    A vocabulary has several where programs differ, as kohya's has for SDXL; names stay as they are
    unless the adapters then have more modules in common. Projections that some of them fuse are in
    the form of the first adapter that has them. Raises IncompatibleError as `renamed`.
    """
    found: list[Adapter] = []
    known: dict[str, Module] = {}
    for adapter in adapters:
        found.append(like(renamed(adapter, naming or adapter.naming), known))
        known |= {n: m for n, m in found[-1].modules.items() if n not in known}
    if len({frozenset(adapter.modules) for adapter in found}) == 1:
        return found
    try:
        spelt = [_translated(adapter, adapter.naming) for adapter in found]
    except IncompatibleError:
        return found
    return spelt if len(_common(spelt)) > len(_common(found)) else found


def _common(adapters: Sequence[Adapter]) -> set[str]:
    return set.intersection(*(set(adapter.modules) for adapter in adapters))


def _translated(adapter: Adapter, naming: str) -> Adapter:
    """The adapter with the first spelling of a vocabulary, be it that of its own names."""
    fitting = [f for f in families() if adapter.naming == "diffusers" or not f.leaves_only]
    found = [_translation(adapter, family, naming) for family in fitting]
    whole = [translation for translation in found if not translation.unknown]
    if not whole:
        raise _no_counterpart(adapter, naming, min(found, key=lambda t: len(t.unknown)))
    return replace(adapter, naming=naming, modules=_modules(adapter, _one_of(adapter, whole)))


class Translation(Struct, frozen=True):
    """What the names of an adapter are in another vocabulary, as one family sees it.

    `found` says which parts each name stands for in diffusers, `targets` which parts make each
    name of the other vocabulary; `unknown` are names without a counterpart.
    """

    family: Family
    found: Mapping[str, Found]
    targets: Mapping[str, Found]
    unknown: Sequence[str]

    @property
    def key(self) -> Iterator[tuple[object, ...]]:
        """What makes it differ from the translation of another family."""
        for name, found in self.targets.items():
            yield name, found.parts, found.row.shares, found.row.swapped
        for name, found in self.found.items():
            yield name, found.parts, found.row.shares, found.row.swapped

    @property
    def complete(self) -> bool:
        """Whether it adapts every block of a model of this family that was released."""
        seen: dict[str, set[int]] = {}
        for found in self.found.values():
            for part in found.parts:
                for stack in self.family.depths:
                    if match := re.match(stack.format(r"(\d+)"), part.partition(".")[2]):
                        seen.setdefault(stack, set()).add(int(match[1]))
        return bool(seen) and all(
            len(numbers) == max(numbers) + 1 and len(numbers) in self.family.depths[stack]
            for stack, numbers in seen.items()
        )


def _translation(adapter: Adapter, family: Family, naming: str) -> Translation:
    """Names and shapes looked up in the tables of a family; no tensor is read."""
    found: dict[str, Found] = {}
    targets: dict[str, Found] = {}
    for name, module in adapter.modules.items():
        here = family.parse(adapter.naming, name)
        if here is None or not fits(here.row, module):
            continue
        spelt = [family.spell(naming, part) for part in here.parts]
        heights = part_heights(here.row, module)
        if all(
            there is not None
            and there.whole == family.parse(naming, there.name)  # back again it is the same
            and holds(there.whole.row, there.place, (rows, module.in_features))
            for there, rows in zip(spelt, heights, strict=True)
        ):
            found[name] = here
            targets |= {there.name: there.whole for there in spelt if there is not None}
    unknown = [name for name in adapter.modules if name not in found]
    return Translation(family, found, targets, unknown)


def _one_of(adapter: Adapter, whole: Sequence[Translation]) -> Translation:
    """The one way to translate all names.

    Where families differ: the one its base model is called after, or whose every block it adapts.
    """
    likely = _likely(adapter, whole)
    if len(likely) == 1 or len({tuple(sorted(translation.key)) for translation in whole}) == 1:
        return likely[0]
    raise IncompatibleError(
        f"{adapter.reference}: its module names fit several families of models, "
        f"{listed([t.family.name for t in whole])}, and mean different layers in each.",
        ONE_LAYOUT,
    )


def family_of(adapter: Adapter) -> str:
    """The family of models that explains all names of a pipeline's adapter; "" without one.

    Where several do, and neither its base model nor its blocks tell, the first of the tables.
    """
    found = [_translation(adapter, family, "diffusers") for family in families()]
    whole = [translation for translation in found if not translation.unknown]
    return _likely(adapter, whole)[0].family.name if whole else ""


def _likely(adapter: Adapter, whole: Sequence[Translation]) -> Sequence[Translation]:
    """The one its base model is called after, or whose every block it adapts; else all."""
    said = (adapter.base_model or "", *(adapter.metadata.get(key, "") for key in ABOUT_BASE))
    base = [re.sub("[^a-z0-9]", "", text.lower()) for text in said]
    for chosen in (
        [t for t in whole if any(re.search(t.family.called, text) for text in base)],
        [t for t in whole if t.complete],
    ):
        if len(chosen) == 1:
            return chosen
    return whole


def _modules(adapter: Adapter, translation: Translation) -> dict[str, Module]:
    """The modules of the other vocabulary: taken apart into diffusers' parts, then stacked."""
    hub: dict[str, Module | None] = {}
    origin: dict[str, str] = {}
    for name, found in translation.found.items():
        pieces = parts(adapter.source, found.row, adapter.modules[name])
        for part, piece in zip(found.parts, pieces, strict=True):
            if part in hub:
                raise IncompatibleError(
                    f"{adapter.reference} adapts {part} twice: {origin[part]}, {name}.",
                    "remove one of them from the file",
                )
            hub[part], origin[part] = piece, name
    modules = {}
    for name, found in translation.targets.items():
        members = [hub.get(part) for part in found.parts]
        if any(members):
            modules[name] = together(adapter.source, found.row, name, members)
    return modules


def _without_component(adapter: Adapter) -> Adapter:
    """The paths in a model itself. Raises IncompatibleError where it adapts several models."""
    components = sorted({name.partition(".")[0] for name in adapter.modules})
    if len(components) > 1:
        raise IncompatibleError(
            f"{adapter.reference} adapts {len(components)} models, {listed(components)}; a PEFT "
            "adapter holds one.",
            "--to diffusers holds them all",
        )
    paths = {name.partition(".")[2]: module for name, module in adapter.modules.items()}
    modules = {path: replace(module, name=path) for path, module in paths.items()}
    return replace(adapter, naming="model", modules=modules)


def _no_counterpart(adapter: Adapter, naming: str, closest: Translation) -> IncompatibleError:
    every, unknown = len(adapter.modules), list(closest.unknown)
    if len(unknown) == every:
        message = f"none of its {every} module names is of a model known to have names in {naming}"
    else:
        message = (
            f"as names of {closest.family.name}, {len(unknown)} of {every} have no counterpart in "
            f"{naming}"
        )
    return IncompatibleError(
        f"{adapter.reference}: {message}: {listed(unknown, 4)}.",
        ONE_LAYOUT,
    )
