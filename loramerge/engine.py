"""Run a plan: compute, write, measure what was written.

A plan with nothing to decide on the way streams: each module is read, computed, written and
measured by one worker, and memory holds a few modules. Where ranks or the scale depend on the
whole adapter, results wait in a spool between two passes.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from loramerge._spool import Spool
from loramerge._version import __version__
from loramerge.adapter import LowRank, TensorSource
from loramerge.align import Aligned
from loramerge.batches import batches
from loramerge.census import take
from loramerge.compute import Compute, resolve, single_threaded_blas
from loramerge.errors import GateError, IncompatibleError
from loramerge.events import Listener, Started, silent
from loramerge.linalg.factors import Grams
from loramerge.output import Output
from loramerge.plan import Plan
from loramerge.report import ModuleReport, Report
from loramerge.solve import Seen, Solved, read_target, solve
from loramerge.survey import Survey, decide
from loramerge.workers import each

__all__ = ["Computed", "file_sha256", "keep", "run"]

Solver: TypeAlias = Callable[[Sequence[Aligned]], list[Solved]]


class Computed(Struct, frozen=True):
    """The results of a plan, which wait in a spool, and what was seen of every module."""

    seen: Sequence[Seen]
    spool: Spool


def run(
    plan: Plan, target: Path, listen: Listener = silent, computed: Computed | None = None
) -> Report:
    """Compute a plan and write its weights file to `target`, which must not exist.

    What is `computed` already is only written.

    Raises IncompatibleError where the inputs hold NaN or Inf, GateError where --max-error was not
    met, OutputError where the file reads back different from what was written.
    """
    began = time.perf_counter()
    settings = plan.recipe.settings
    compute = resolve(settings.device, settings.compute_dtype, plan.formed)
    with ThreadPoolExecutor(compute.threads) as pool, ExitStack() as stack:
        hashes = [pool.submit(file_sha256, adapter.source) for adapter in plan.adapters]
        stack.enter_context(single_threaded_blas())  # numpy is imported while hashing has begun
        solver = partial(solve, plan, compute)
        if computed is None:
            solver = partial(solver, known=take([plan], compute, pool, listen)[0])
            if plan.surveyed:
                spool = stack.enter_context(Spool())
                computed = _computed(plan, compute, solver, pool, spool, listen)
        survey = _survey(plan, computed) if computed else None
        output = Output(plan, survey.ranks if survey else plan.ranks, target)
        stack.callback(output.let_go)
        listen(Started("writing", len(plan.alignment.modules)))
        if computed and survey:
            modules = _spooled(plan, survey, computed.spool, pool, output, listen)
        else:
            modules = _streamed(plan, compute, solver, pool, output, listen)
        sources = tuple(future.result() for future in hashes)
        digest = output.close(pool, sources)
    order = {module.name: place for place, module in enumerate(plan.alignment.modules)}
    report = Report(
        plan=plan,
        modules=tuple(sorted(modules, key=lambda module: order[module.name])),
        scale=survey.scale if survey else 1.0,
        others=survey.others if survey else {},
        sources_sha256=sources,
        tensors_sha256=digest,
        tensors=len(output.written.tensors),
        file_bytes=target.stat().st_size,
        seconds=time.perf_counter() - began,
        device=compute.device,
        machine=compute.machine(),
        versions={"loramerge": __version__, **compute.versions()},
        companions=output.written.companions,
        not_finite=output.not_finite,
    )
    _check_bound(report)
    return report


def _check_bound(report: Report) -> None:
    bound = report.plan.recipe.settings.max_error
    if bound is None or not report.plan.exact:
        return
    # With an allocation the bound is one on the whole adapter.
    whole = report.plan.recipe.settings.allocate is not None
    error = report.relative_error if whole else report.worst.relative_error
    if error > bound:
        raise GateError(
            f"--max-error {bound:g} is out of reach: "
            f"{'the adapter' if whole else report.worst.name} has {error:.2e} "
            f"as {report.plan.dtype}.",
            "store more digits with --save-dtype float32, or allow a larger error",
        )


def _streamed(
    plan: Plan,
    compute: Compute,
    solver: Solver,
    pool: Executor,
    output: Output,
    listen: Listener,
) -> list[ModuleReport]:
    """Solve and write in one go, batches side by side."""
    by_name = {module.name: module for module in plan.alignment.modules}

    def work(batch: Sequence[Aligned]) -> list[ModuleReport]:
        return [
            output.emit(by_name[s.name], s.update, s.target, s.seen.condition)
            for s in solver(batch)
        ]

    return each(pool, work, batches([plan], compute), listen)


def _spooled(
    plan: Plan,
    survey: Survey,
    spool: Spool,
    pool: Executor,
    output: Output,
    listen: Listener,
) -> list[ModuleReport]:
    """The second pass: what waited in the spool, at its final rank and length."""

    def work(batch: Sequence[Aligned]) -> list[ModuleReport]:
        return [emitted(module) for module in batch]

    def emitted(module: Aligned) -> ModuleReport:
        A, B, *known = spool.get(module.name)
        update = survey.finished(LowRank(A, B), module.name)
        target = replace(read_target(plan, module), known=Grams(*known) if known else None)
        return output.emit(module, update, target, survey.conditions[module.name])

    return each(pool, work, ((module,) for module in plan.alignment.modules), listen)


def keep(spool: Spool, one: Solved) -> Seen:
    """Put a result into the spool."""
    known = one.target and one.target.known
    spool.put(one.name, one.update.A, one.update.B, *((known.B, known.A) if known else ()))
    return one.seen


def _computed(
    plan: Plan,
    compute: Compute,
    solver: Solver,
    pool: Executor,
    spool: Spool,
    listen: Listener,
) -> Computed:
    """The first pass: every result into the spool."""
    listen(Started("computing", len(plan.alignment.modules)))

    def work(batch: Sequence[Aligned]) -> list[Seen]:
        return [keep(spool, one) for one in solver(batch)]

    return Computed(each(pool, work, batches([plan], compute), listen), spool)


def _survey(plan: Plan, computed: Computed) -> Survey:
    """Ranks and scale from all results."""
    survey = decide(plan, computed.seen)
    if not any(survey.ranks.values()):
        pruned = (
            "every term was pruned"
            if plan.recipe.method.chooses_rank
            else "the sum of the updates is zero"
        )
        raise IncompatibleError(f"No module keeps a rank: {pruned}.")
    return survey


def file_sha256(source: TensorSource) -> str:
    """The hash of a source file, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    for chunk in source.chunks():
        digest.update(chunk)
    return digest.hexdigest()
