"""Several methods on the same adapters: what each would give, from one reading of every module."""

import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from loramerge._spool import Spool
from loramerge.align import Aligned
from loramerge.batches import batches, parts
from loramerge.census import take
from loramerge.compute import Compute, resolve, single_threaded_blas
from loramerge.engine import Computed, keep
from loramerge.errors import UsageError
from loramerge.events import Advanced, Listener, Started, silent
from loramerge.options import read_value
from loramerge.plan import Plan
from loramerge.reading import read_updates, seen_by
from loramerge.recipe import Named, Recipe, find, flags, make_recipe, options_of
from loramerge.solve import halving, merged, weighted_sum
from loramerge.trials import Trial, Tried, measured, trial

__all__ = ["Compared", "Entry", "compare_methods", "entries", "recipes"]

# Settings that decide what is read, or under which names: no row has its own.
READING = (
    "include",
    "exclude",
    "missing",
    "module_weight",
    "extras",
    "base_mismatch",
    "to",
    "device",
    "compute_dtype",
    "seed",
)


class Entry(Struct, frozen=True):
    """One row that was asked for: a method or preset, with options of its own."""

    name: str
    method: str
    values: Mapping[str, object]


class Compared(Struct, frozen=True):
    """One row: what it would give, and the seconds it computed, of all threads.

    `computed` are the results themselves, where they were kept.
    """

    entry: Entry
    plan: Plan
    trial: Trial
    seconds: float
    computed: Computed | None


def entries(methods: str | Iterable[str]) -> list[Entry]:
    """Rows as they are written: ties, or ties:density=0.5:lambda=2; commas stand between them.

    Raises UsageError for what is no method, and for an option without a value.
    """
    texts = methods.split(",") if isinstance(methods, str) else methods
    return [_entry(text.strip()) for text in texts if text.strip()]


def _entry(text: str) -> Entry:
    """One row, whose values the method's declaration is to judge."""
    method, *pairs = text.split(":")
    options = {option.key: option for option in options_of(find(method)[0])}
    values: dict[str, object] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise UsageError(
                f"compare: '{pair}' in {text} is no option with a value.",
                f"for example: {method}:{next(iter(options))}=VALUE",
            )
        option = options.get(key.replace("-", "_"))
        values[option.name if option else key] = read_value(option, value) if option else value
    return Entry(text, method, values)


def recipes(
    entries: Sequence[Entry], adapters: Sequence[Named], values: Mapping[str, object]
) -> list[Recipe]:
    """One recipe for each row, with the settings of all and its own.

    Raises UsageError for what is no merge, for a row that stands twice, for what a row cannot have
    alone as modules are read once for all, and where a method does not take its options.
    """
    if not entries:
        raise UsageError("compare needs methods.", "for example: --methods arithmetic,ties")
    names = [entry.name for entry in entries]
    for entry in entries:
        if not find(entry.method)[0].merges:
            raise UsageError(f"{entry.method} merges nothing.", "compare takes methods that merge")
        if names.count(entry.name) > 1:
            raise UsageError(f"compare: {entry.name} stands twice.", "give one of them options")
        if alike := [key for key in entry.values if key in READING]:
            raise UsageError(
                f"compare: {entry.name}: {flags(alike)} is for all methods, as every module is "
                "read once.",
                f"type {flags(alike)} by itself",
            )
    return [make_recipe(one.method, adapters, {**values, **one.values}) for one in entries]


def compare_methods(
    entries: Sequence[Entry],
    plans: Sequence[Plan],
    spools: Sequence[Spool] = (),
    listen: Listener = silent,
) -> tuple[Compared, ...]:
    """Try plans that differ in nothing but the method and its options; nothing is written.

    With a spool for each, the results are kept there. Raises IncompatibleError where the adapters
    hold NaN or Inf.
    """
    first = next((plan for plan in plans if plan.recipe.method.siblings), plans[0])
    settings = first.recipe.settings
    formed = sum(plan.formed for plan in plans)
    compute = resolve(settings.device, settings.compute_dtype, formed)
    tried: list[tuple[Tried, ...]] = []
    seconds = [0.0] * len(plans)
    with single_threaded_blas(), ThreadPoolExecutor(compute.threads) as pool:
        known = take(plans, compute, pool, listen)
        work = partial(halving, partial(_batch, first, plans, known, spools, compute), compute)
        listen(Started("comparing", len(first.alignment.modules)))
        for results in pool.map(work, batches([first, *plans], compute)):
            for modules, spent in results:
                tried += modules
                seconds = [before + more for before, more in zip(seconds, spent, strict=True)]
                listen(Advanced(len(modules)))
    found = []
    for place, column in enumerate(zip(*tried, strict=True)):
        plan = plans[place]
        kept = Computed([one.seen for one in column], spools[place]) if spools else None
        given = trial(plan, column, 0.0)
        found.append(Compared(entries[place], plan, given, seconds[place], kept))
    return tuple(found)


def _batch(
    first: Plan,
    plans: Sequence[Plan],
    known: Sequence[Any],
    spools: Sequence[Spool],
    compute: Compute,
    batch: Sequence[Aligned],
) -> list[tuple[list[tuple[Tried, ...]], list[float]]]:
    """Every module of a batch under every plan, and the seconds of each plan."""
    shared, done = dict[Any, Any](), []
    for part in parts(first, batch):
        updates = read_updates(first, compute, part, shared)
        # What all are measured against, and most begin with, is no row's own.
        weighted_sum(first, updates)
        found, seconds = [], []
        for place, (plan, counted) in enumerate(zip(plans, known, strict=True)):
            began = time.perf_counter()
            seen = replace(seen_by(plan, updates, part), known=counted)
            solved = merged(plan, compute, part, seen)
            seconds.append(time.perf_counter() - began)
            if spools:
                for one in solved:
                    keep(spools[place], one)
            pairs = zip(part, solved, strict=True)
            found.append([measured(plan, module, one, {}) for module, one in pairs])
        done.append((list(zip(*found, strict=True)), seconds))
    return done
