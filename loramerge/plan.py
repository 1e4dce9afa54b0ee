"""From a recipe and the headers of its adapters to what will be done; no tensor is read."""

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import msgspec
from msgspec import Struct, field
from msgspec.structs import replace

from loramerge._version import __version__
from loramerge.adapter import Adapter, Module, public_base, source_name
from loramerge.align import Aligned, Alignment, align, reach, weighed
from loramerge.beside import KEPT, check_extras, tokenizer
from loramerge.compute import save_dtype
from loramerge.errors import IncompatibleError, UsageError, listed
from loramerge.io._layout import Draft, Layout, Written
from loramerge.io._names import alike
from loramerge.io._open import layout, written_as
from loramerge.io._write import file_size
from loramerge.limits import highest_ranks, resolved
from loramerge.options import Options
from loramerge.recipe import Recipe
from loramerge.record import (
    KEY,
    UNKNOWN,
    Canonical,
    Record,
    Source,
    made,
    source,
    unlicensed,
    unsaid,
)

__all__ = ["Plan", "assumed", "check_variants", "make_plan"]


class Plan(Struct, frozen=True):
    """Everything decided before a tensor is read.

    `ranks` are the kept ranks by module, where they follow from the headers; they are upper bounds
    where `recipe.criterion` chooses them from singular values. `notes` are what a user must
    know: dropped, assumed, padded. `tokenizer` are files that go with the result.
    """

    recipe: Recipe
    options: Options
    adapters: tuple[Adapter, ...]
    alignment: Alignment
    layout: Layout
    dtype: str
    ranks: Mapping[str, int]
    uniform: bool
    sources: tuple[Source, ...]
    notes: tuple[str, ...]
    tokenizer: Mapping[str, Path] = field(default_factory=dict)

    @property
    def surveyed(self) -> bool:
        """Whether a first pass over all modules must come before the first value is written."""
        return self.recipe.criterion is not None or self.scaled

    @property
    def exact(self) -> bool:
        """Whether the rule is the weighted sum itself, so that a measured error is what was cut."""
        recipe = self.recipe
        return recipe.merge.calibrate is None and recipe.method.exact(self.options)

    @property
    def dense(self) -> bool:
        """Whether the method forms delta weights."""
        return getattr(self.options, "space", None) == "dense"

    @property
    def formed(self) -> int:
        """How many entries of delta weights the method forms, all adapters together."""
        each = (prod(module.model.shape) for module in self.alignment.modules)
        return len(self.adapters) * sum(each) if self.dense else 0

    @property
    def counts(self) -> int:
        """Passes over all modules in which the method only counts."""
        census = self.recipe.method.census
        return census.passes(self.options) if census else 0

    @property
    def passes(self) -> int:
        """How often every module is looked at."""
        return self.counts + (2 if self.surveyed else 1)

    @property
    def scaled(self) -> bool:
        """Whether the length of the result follows from norms over the whole adapter."""
        return self.recipe.scale in ("auto", "norm", "ls", "size")

    @property
    def read(self) -> set[tuple[int, str]]:
        """The low-rank tensors to read: position of their adapter, and key."""
        return {
            (position, key)
            for module in self.alignment.modules
            for position, member in enumerate(module.members)
            if member is not None
            for key in member.keys.values()
        }

    @property
    def read_bytes(self) -> int:
        """Bytes of the low-rank tensors to read."""
        return sum(self.adapters[place].source.tensors[key].nbytes for place, key in self.read)

    @property
    def coverage(self) -> tuple[int, int]:
        """How many tensors of all adapters are in the result, and how many they hold."""
        holders = self.adapters if self.recipe.merge.extras == "mean" else self.adapters[:1]
        kept = sum(len(adapter.extras) for adapter in holders) if self._carries_extras else 0
        return len(self.read) + kept, sum(len(one.source.tensors) for one in self.adapters)

    def draft(self, ranks: Mapping[str, int]) -> Draft:
        """The result with these ranks: padded to one where the form is uniform, empty ones gone."""
        kept = [module for module in self.alignment.modules if ranks[module.name] > 0]
        highest = max((ranks[module.name] for module in kept), default=1)
        modules = []
        for module in kept:
            rank = highest if self.uniform else ranks[module.name]
            alpha = rank if self.layout.unscaled else highest
            modules.append(_module(module, rank, alpha, self.dtype))
        extras = self.adapters[0].extras if self._carries_extras else ()
        mean = len(self.adapters) > 1 and self.recipe.merge.extras == "mean"
        return Draft(tuple(modules), self.adapters, extras, self.uniform, mean)

    def written(self, ranks: Mapping[str, int]) -> Written:
        """The file with these ranks, as the layout stores it, and how it was made in its header."""
        written = self.layout.write(self.draft(ranks))
        text = self.record([UNKNOWN] * len(self.sources)).text()
        return replace(written, metadata={**written.metadata, KEY: text})

    def record(self, sources_sha256: Sequence[str]) -> Record:
        """How the result is made, and from what."""
        sources = [
            msgspec.structs.replace(known, sha256=digest)
            for known, digest in zip(self.sources, sources_sha256, strict=True)
        ]
        return Record(Canonical(**self.recipe.canonical()), tuple(sources), __version__)

    def file_size(self, ranks: Mapping[str, int]) -> int:
        """Bytes of the weights file with these ranks."""
        return file_size(self.written(ranks))

    @property
    def _carries_extras(self) -> bool:
        same = self.layout.name == written_as(self.adapters[0])
        return same and (len(self.adapters) == 1 or self.recipe.merge.extras in KEPT)


def _module(module: Aligned, rank: int, alpha: int, dtype: str) -> Module:
    """The module as stored. One alpha for all, or each its rank: any other is misread."""
    return replace(module.model, rank=rank, scaling=alpha / rank, dtype=dtype, keys={})


def make_plan(recipe: Recipe, adapters: Sequence[Adapter]) -> Plan:
    """Check that the recipe fits the adapters, and decide ranks, layout, dtype.

    Raises IncompatibleError or UsageError, before any tensor is read, for whatever does not fit.
    """
    notes = [f"{source_name(adapter)}: {note}" for adapter in adapters for note in assumed(adapter)]
    check_variants(adapters)
    notes += check_extras(recipe, adapters)
    notes += _check_bases(recipe, adapters)
    settings = recipe.settings
    target, more = _layout(recipe, adapters)
    notes += more
    adapters = alike(adapters, target.naming)
    aligned = align(adapters, recipe.merge.missing, settings.include, settings.exclude)
    alignment = weighed(aligned, recipe.weights, adapters)
    notes += _left_out(alignment)
    names = [module.name for module in alignment.modules]
    files, more = tokenizer(recipe.merge.extras, adapters, names)
    notes += more
    notes += _module_weights(recipe, aligned)
    options = resolved(recipe, alignment)
    ranks, more = highest_ranks(recipe, options, alignment)
    notes += more
    members = [member for module in alignment.modules for member in module.members if member]
    notes += recipe.method.remarks(options, members)
    per_module = recipe.criterion is not None and not (
        settings.allocate in (None, "uniform") and settings.size is not None
    )
    uniform = settings.layout == "uniform" if settings.layout else not per_module
    if target.one_rank and not uniform:
        if settings.layout == "pattern":
            raise UsageError(
                f"--layout pattern: {target.name} has room for only one rank.", "leave it out"
            )
        uniform = True
    dtypes = {dtype for adapter in adapters for dtype in adapter.dtypes}
    plan = Plan(
        recipe=recipe,
        options=options,
        adapters=tuple(adapters),
        alignment=alignment,
        layout=target,
        dtype=save_dtype(settings.save_dtype, dtypes),
        ranks=ranks,
        uniform=uniform,
        sources=tuple(source(adapter) for adapter in adapters),
        notes=tuple(notes),
        tokenizer=files,
    )
    step = settings.round_to or 1
    least = plan.written({name: min(step, rank) for name, rank in ranks.items()})
    notes += [*unsaid(adapters, least.metadata), *unlicensed(adapters)]
    plan = replace(plan, notes=tuple(notes))
    smallest = file_size(least)
    if recipe.criterion and recipe.criterion.size and smallest > recipe.criterion.size:
        raise UsageError(
            f"--size {settings.size} is below the {smallest:,} bytes of rank {step} per module.",
            f"ask for at least --size {smallest}",
        )
    return plan


def assumed(adapter: Adapter) -> tuple[str, ...]:
    """What had to be assumed of an adapter, or could not be taken over from it."""
    said = [*adapter.assumed]
    if lost := made(adapter)[1]:
        said.append(lost)
    if adapter.origin and adapter.origin.tokenizer:
        files = listed(list(adapter.origin.tokenizer))
        said.append(f"files of a tokenizer stay on the Hub: {files} (loramerge pull brings them)")
    return tuple(said)


def check_variants(adapters: Sequence[Adapter]) -> None:
    """Raise IncompatibleError for adapters that are more than plain LoRA, with every reason."""
    found = [(adapter, variant) for adapter in adapters for variant in adapter.variants]
    if found:
        reasons = "; ".join(f"{a.reference} is {v.name}: {v.reason}" for a, v in found)
        raise IncompatibleError(f"{reasons}.", found[0][1].hint)


def _check_bases(recipe: Recipe, adapters: Sequence[Adapter]) -> list[str]:
    named = {a.base_model for a in adapters if a.base_model}
    if len(named) < 2 or recipe.merge.base_mismatch == "ignore":
        return []
    message = "the adapters name different base models"
    if recipe.merge.base_mismatch == "error":
        raise IncompatibleError(
            f"{message}: {listed(sorted(named))}.",
            "--base-mismatch warn merges them all the same",
        )
    public = {public_base(a) or "a local path" for a in adapters if a.base_model}
    return [f"{message}: {listed(sorted(public))}"]


def _left_out(alignment: Alignment) -> list[str]:
    notes = []
    if alignment.excluded:
        notes.append(f"left out by --include/--exclude: {listed(list(alignment.excluded))}")
    if alignment.skipped:
        notes.append(f"left out, not in every adapter: {listed(list(alignment.skipped))}")
    if alignment.weightless:
        notes.append(f"left out, every weight is 0: {listed(list(alignment.weightless))}")
    if alignment.partial:
        notes.append(
            f"{len(alignment.partial)} modules are not in every adapter and count as zero there: "
            f"{listed(list(alignment.partial), 3)}"
        )
    return notes


def _module_weights(recipe: Recipe, aligned: Alignment) -> list[str]:
    """How far each --module-weight reaches."""
    total = len(aligned.modules)
    return [
        f"--module-weight '{one.text}' weighs {reach(one, aligned)} of {total} modules"
        for one in recipe.weights.modules
    ]


def _layout(recipe: Recipe, adapters: Sequence[Adapter]) -> tuple[Layout, list[str]]:
    """The layout of the result: the one asked for, or that of the first adapter; and notes."""
    if recipe.settings.to != "same":
        return layout(recipe.settings.to), []
    found = list(dict.fromkeys(written_as(adapter) for adapter in adapters))
    others = f"the adapters are in different layouts; written as {found[0]} (--to chooses another)"
    return layout(found[0]), [others] if len(found) > 1 else []
