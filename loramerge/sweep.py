"""A table over one option of a method: what each of its values would keep and cost.

Every module is read once for all values, and nothing is written.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from loramerge.align import Aligned
from loramerge.compute import Compute, resolve, single_threaded_blas
from loramerge.events import Advanced, Listener, Started, silent
from loramerge.linalg.factors import compare
from loramerge.plan import Plan
from loramerge.report import ModuleReport, whole_energy, whole_error
from loramerge.solve import (
    Seen,
    Solved,
    batches,
    finished,
    halving,
    read_target,
    read_updates,
    weighted_sum,
)
from loramerge.survey import decide

__all__ = ["Trial", "sweep"]


@dataclass(frozen=True, slots=True)
class Trial:
    """What one value would give, before its factors are rounded to a stored dtype.

    `ranks` are the kept ranks by module, `parameters` how many numbers they hold, `figures` what
    the method tells besides, summed over modules.
    """

    value: float
    ranks: Mapping[str, int]
    parameters: int
    energy: float
    relative_error: float
    figures: Mapping[str, float]
    file_bytes: int


def sweep(plans: Sequence[Plan], listen: Listener = silent) -> tuple[Trial, ...]:
    """Try plans that differ in nothing but the option their method can be swept over.

    Raises IncompatibleError where the inputs hold NaN or Inf.
    """
    settings = plans[0].recipe.settings
    compute = resolve(settings.device, settings.compute_dtype, plans[0].read_bytes)
    work = partial(halving, partial(_tried, plans, compute), compute)
    tried: list[tuple[_Tried, ...]] = []
    listen(Started("trying", len(plans[0].alignment.modules)))
    with single_threaded_blas(), ThreadPoolExecutor(compute.threads) as pool:
        for modules in pool.map(work, batches(plans[0], compute.batch)):
            tried += modules
            listen(Advanced(len(modules)))
    return tuple(map(_trial, plans, zip(*tried, strict=True)))


@dataclass(frozen=True, slots=True)
class _Tried:
    """One module under one plan: what decides ranks and scale, and numbers before the scale."""

    seen: Seen
    numbers: ModuleReport
    figures: Mapping[str, float]


def _tried(
    plans: Sequence[Plan], compute: Compute, batch: Sequence[Aligned]
) -> list[tuple[_Tried, ...]]:
    """Every module of a batch under every plan."""
    method, options = plans[0].recipe.method, plans[0].options
    assert method.sweep is not None
    updates = read_updates(plans[0], compute, batch)
    target = weighted_sum(updates)
    values = [getattr(plan.options, method.sweep.option) for plan in plans]
    trials = method.sweep.rule(updates, options, values)
    found = []
    for plan, (result, figures) in zip(plans, trials, strict=True):
        numbers = {name: compute.unload(figure) for name, figure in figures.items()}
        solved = finished(plan, compute, batch, updates, target, result)
        found.append(
            [
                _measured(plan, module, one, {name: float(x[i]) for name, x in numbers.items()})
                for i, (module, one) in enumerate(zip(batch, solved, strict=True))
            ]
        )
    return list(zip(*found, strict=True))


def _measured(plan: Plan, module: Aligned, one: Solved, figures: Mapping[str, float]) -> _Tried:
    target = one.target or read_target(plan, module)
    near = compare(target.update, one.update, target.known)
    numbers = [float(n) for n in (near.target, near.result, near.inner, near.error)]
    return _Tried(one.seen, ModuleReport(module.name, module.ranks, 0, 0, *numbers), figures)


def _trial(plan: Plan, tried: Sequence[_Tried]) -> Trial:
    """One row of the table, from all modules under one plan."""
    assert plan.recipe.method.sweep is not None
    survey = decide(plan, [one.seen for one in tried])
    modules = [_scaled(one.numbers, survey.scale) for one in tried]
    shapes = {module.name: sum(module.model.shape) for module in plan.alignment.modules}
    return Trial(
        value=getattr(plan.options, plan.recipe.method.sweep.option),
        ranks=survey.ranks,
        parameters=sum(rank * shapes[name] for name, rank in survey.ranks.items()),
        energy=whole_energy(modules),
        relative_error=whole_error(modules),
        figures={name: sum(one.figures[name] for one in tried) for name in tried[0].figures},
        file_bytes=plan.file_size(survey.ranks) if any(survey.ranks.values()) else 0,
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
