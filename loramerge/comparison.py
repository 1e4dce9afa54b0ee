"""Several methods on the same adapters: what each would give, from one reading of every module."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from loramerge.adapter import Adapter
from loramerge.align import Aligned
from loramerge.census import take
from loramerge.compute import Compute, resolve, single_threaded_blas
from loramerge.errors import UsageError
from loramerge.events import Advanced, Listener, Started, silent
from loramerge.plan import Plan, make_plan
from loramerge.reading import read_updates
from loramerge.recipe import Named, Recipe, find, make_recipe
from loramerge.solve import batches, finished, halving, weighted_sum
from loramerge.trials import Trial, Tried, measured, trial

__all__ = ["Compared", "compare_methods", "recipes"]


class Compared(Struct, frozen=True):
    """One method: its recipe, what it would give, and the seconds it computed, of all threads."""

    name: str
    recipe: Recipe
    trial: Trial
    seconds: float


def recipes(
    names: Sequence[str], adapters: Sequence[Named], values: Mapping[str, object]
) -> list[Recipe]:
    """One recipe for each method or preset, with the same settings.

    Raises UsageError for a name that is no merge, and where a method does not take the settings.
    """
    for name in names:
        if find(name)[0].takes != "many":
            raise UsageError(f"{name} merges nothing.", "compare takes methods that merge")
    if not names:
        raise UsageError("compare needs methods.", "for example: --methods arithmetic,ties")
    return [make_recipe(name, adapters, values) for name in names]


def compare_methods(
    names: Sequence[str],
    recipes: Sequence[Recipe],
    adapters: Sequence[Adapter],
    listen: Listener = silent,
) -> tuple[Compared, ...]:
    """Try recipes that differ in nothing but the method and its options; nothing is written.

    Raises IncompatibleError where the adapters do not fit together or hold NaN or Inf.
    """
    plans = [make_plan(recipe, adapters) for recipe in recipes]
    settings = plans[0].recipe.settings
    compute = resolve(settings.device, settings.compute_dtype, plans[0].read_bytes)
    tried: list[tuple[Tried, ...]] = []
    seconds = [0.0] * len(plans)
    with single_threaded_blas(), ThreadPoolExecutor(compute.threads) as pool:
        known = [take(plan, compute, pool, listen) for plan in plans]
        work = partial(halving, partial(_batch, plans, known, compute), compute)
        listen(Started("comparing", len(plans[0].alignment.modules)))
        for results in pool.map(work, batches(plans[0], compute.batch)):
            for modules, spent in results:
                tried += modules
                seconds = [before + more for before, more in zip(seconds, spent, strict=True)]
                listen(Advanced(len(modules)))
    columns = zip(*tried, strict=True)
    return tuple(
        Compared(name, plan.recipe, trial(plan, column, 0.0), spent)
        for name, plan, column, spent in zip(names, plans, columns, seconds, strict=True)
    )


def _batch(
    plans: Sequence[Plan], known: Sequence[Any], compute: Compute, batch: Sequence[Aligned]
) -> list[tuple[list[tuple[Tried, ...]], list[float]]]:
    """Every module of a batch under every plan, and the seconds of each plan."""
    updates = read_updates(plans[0], compute, batch)
    target = weighted_sum(updates)
    found, seconds = [], []
    for plan, counted in zip(plans, known, strict=True):
        began = time.perf_counter()
        rank = None if plan.recipe.criterion else plan.ranks[batch[0].name]
        result = plan.recipe.method.rule(replace(updates, rank=rank, known=counted), plan.options)
        solved = finished(plan, compute, batch, updates, target, result)
        seconds.append(time.perf_counter() - began)
        found.append(
            [measured(plan, module, one, {}) for module, one in zip(batch, solved, strict=True)]
        )
    return [(list(zip(*found, strict=True)), seconds)]
