"""A table over one option of a method: what each of its values would keep and cost.

Every module is read once for all values, and nothing is written.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import fmean

from msgspec import Struct
from msgspec.structs import replace

from loramerge.adapter import Adapter, Array
from loramerge.align import Aligned
from loramerge.batches import batches
from loramerge.compute import Compute, resolve, single_threaded_blas
from loramerge.errors import UsageError, listed
from loramerge.events import Advanced, Listener, Started, silent
from loramerge.io._hub import fetch
from loramerge.linalg.factors import compare, term_by_term
from loramerge.output import terms
from loramerge.plan import Plan, make_plan
from loramerge.reading import read_updates
from loramerge.recipe import Named, Recipe, find, flags, make_recipe
from loramerge.registry import methods
from loramerge.report import ModuleReport, whole_energy, whole_error
from loramerge.settings import BOUNDS, REFINEMENTS
from loramerge.solve import Seen, Solved, finished, halving, read_target, weighted_sum
from loramerge.survey import decide

__all__ = ["Trial", "Tried", "measured", "sweep", "sweep_recipes", "trial"]


class Trial(Struct, frozen=True):
    """What one value would give, before its factors are rounded to a stored dtype.

    `ranks` are the kept ranks by module, `parameters` how many numbers they hold, `scale` the
    factor on a merge, `figures` what the method tells besides, summed over modules.
    """

    value: float
    ranks: Mapping[str, int]
    parameters: int
    energy: float
    relative_error: float
    scale: float
    figures: Mapping[str, float]
    file_bytes: int

    @property
    def rank(self) -> tuple[int, int, float]:
        """Smallest, largest and mean kept rank."""
        kept = list(self.ranks.values())
        return min(kept), max(kept), fmean(kept)


def sweep_recipes(
    name: str, adapters: Sequence[Named], values: Mapping[str, object], tried: Sequence[object]
) -> list[Recipe]:
    """One recipe for each value that is to be tried.

    Raises UsageError for a method without such an option, for values that are out of its range, and
    where the ranks would follow from more than that option.
    """
    found = find(name)[0]
    if found.sweep is None:
        able = [method.name for method in methods().values() if method.sweep]
        raise UsageError(f"{name} cannot be swept.", f"{listed(able)} can")
    option = found.sweep.option
    if fixed := [key for key in (option, *BOUNDS, *REFINEMENTS, "calibrate") if key in values]:
        raise UsageError(
            f"{name}: a sweep is over {flags([option])} alone; it takes no {flags(fixed)}.",
            f"for example: {found.sweep.example}",
        )
    if not len(tried):
        raise UsageError(f"{name}: there is no {flags([option])} to try.", found.sweep.example)
    return [make_recipe(name, adapters, {**values, option: value}) for value in tried]


def sweep(
    recipes: Sequence[Recipe], adapters: Sequence[Adapter], listen: Listener = silent
) -> tuple[Trial, ...]:
    """Try recipes that differ in nothing but the option their method can be swept over.

    Raises IncompatibleError where the adapters do not fit together or hold NaN or Inf.
    """
    plans = [make_plan(recipe, adapters) for recipe in recipes]
    fetch(adapters, listen)
    settings = plans[0].recipe.settings
    compute = resolve(settings.device, settings.compute_dtype, plans[0].formed)
    work = partial(halving, partial(_tried, plans, compute), compute)
    tried: list[tuple[Tried, ...]] = []
    listen(Started("trying", len(plans[0].alignment.modules)))
    with single_threaded_blas(), ThreadPoolExecutor(compute.threads) as pool:
        for modules in pool.map(work, batches(plans, compute)):
            tried += modules
            listen(Advanced(len(modules)))
    method = plans[0].recipe.method
    assert method.sweep is not None
    swept = [getattr(plan.options, method.sweep.option) for plan in plans]
    return tuple(map(trial, plans, zip(*tried, strict=True), swept))


class Tried(Struct, frozen=True):
    """One module under one plan: what decides ranks and scale, and numbers before both.

    Where ranks are not decided yet, `terms` are <sum, term> and ||term||^2 of each term of the
    result; the terms are orthogonal to each other.
    """

    seen: Seen
    numbers: ModuleReport
    figures: Mapping[str, float]
    terms: tuple[Array, Array] | None = None


def _tried(
    plans: Sequence[Plan], compute: Compute, batch: Sequence[Aligned]
) -> list[tuple[Tried, ...]]:
    """Every module of a batch under every plan."""
    method, options = plans[0].recipe.method, plans[0].options
    assert method.sweep is not None
    updates = read_updates(plans[0], compute, batch)
    target = weighted_sum(plans[0], updates)
    values = [getattr(plan.options, method.sweep.option) for plan in plans]
    trials = method.sweep.rule(updates, options, values)
    found = []
    for plan, (result, figures) in zip(plans, trials, strict=True):
        numbers = {name: compute.unload(figure) for name, figure in figures.items()}
        solved = finished(plan, compute, batch, updates, target, result)
        found.append(
            [
                measured(plan, module, one, {name: float(x[i]) for name, x in numbers.items()})
                for i, (module, one) in enumerate(zip(batch, solved, strict=True))
            ]
        )
    return list(zip(*found, strict=True))


def measured(plan: Plan, module: Aligned, one: Solved, figures: Mapping[str, float]) -> Tried:
    """One result against the exact weighted sum, before it is cut, scaled and rounded."""
    target = one.target or read_target(plan, module)
    near = compare(target.update, one.update, target.known)
    numbers = [float(n) for n in (near.target, near.result, near.inner, near.error)]
    report = ModuleReport(module.name, module.ranks, terms(one.update), 0, *numbers)
    undecided = plan.recipe.criterion is not None
    products = term_by_term(target.update, one.update) if undecided else None
    return Tried(one.seen, report, figures, products)


def trial(plan: Plan, tried: Sequence[Tried], value: float) -> Trial:
    """One row of a table, from all modules under one plan."""
    survey = decide(plan, [one.seen for one in tried])
    cut = [_cut(one, survey.ranks[one.seen.name]) for one in tried]
    modules = [_scaled(one, survey.scale) for one in cut]
    ranks = {one.name: min(one.rank, survey.ranks[one.name]) for one in modules}
    shapes = {module.name: sum(module.model.shape) for module in plan.alignment.modules}
    return Trial(
        value=value,
        ranks=ranks,
        parameters=sum(rank * shapes[name] for name, rank in ranks.items()),
        energy=whole_energy(modules),
        relative_error=whole_error(modules),
        scale=survey.scale,
        figures={name: sum(one.figures[name] for one in tried) for name in tried[0].figures},
        file_bytes=plan.file_size(survey.ranks) if any(survey.ranks.values()) else 0,
    )


def _cut(one: Tried, rank: int) -> ModuleReport:
    """The numbers of a result Y without its last terms t, which are orthogonal to the others.

    ||Y - t - X||^2 = ||Y - X||^2 + 2 <X, t> - ||t||^2, which keeps the digits of a small error.
    """
    if one.terms is None or rank >= one.numbers.rank:
        return one.numbers
    inner, square = (float(part[rank:].sum()) for part in one.terms)
    whole = one.numbers
    return replace(
        whole,
        rank=rank,
        result=whole.result - square,
        inner=whole.inner - inner,
        error=whole.error + 2 * inner - square,
    )


def _scaled(module: ModuleReport, factor: float) -> ModuleReport:
    """The numbers of a result times a factor f.

    ||f Y - X||^2 = f ||Y - X||^2 + (1 - f) (||X||^2 - f ||Y||^2), which keeps the digits of a small
    error where f is 1.
    """
    gap = (1 - factor) * (module.target - factor * module.result)
    return ModuleReport(
        name=module.name,
        ranks=module.ranks,
        rank=module.rank,
        stored_rank=module.stored_rank,
        target=module.target,
        result=factor**2 * module.result,
        inner=factor * module.inner,
        error=factor * module.error + gap,
    )
