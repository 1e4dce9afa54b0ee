"""What --dry-run prints: plans, made from headers alone."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import click
from msgspec import to_builtins

from loramerge.cli.terminal import Row, print_rows
from loramerge.cli.ui import (
    DTYPES,
    echo_json,
    echo_path,
    in_bytes,
    inputs,
    method_of,
    note_rows,
    ranks_in,
    span,
)
from loramerge.plan import Plan
from loramerge.record import UNKNOWN

if TYPE_CHECKING:
    from loramerge.conversion import Conversion

__all__ = ["show_plans"]

# Bytes of an entry while computing; --compute-dtype float64 has twice as many.
ENTRY = {"float32": 4, "float64": 8}
NOTHING = "nothing was computed or written"
# What would be done, and where its result would go; nowhere if only a later step takes it.
Planned: TypeAlias = "tuple[Plan | Conversion, Path | None]"


def show_plans(
    jobs: Sequence[Planned], *, as_json: bool, quiet: bool, earlier: Sequence[Planned] = ()
) -> None:
    """What would be done, from headers alone; `earlier` are the steps before the last."""
    facts = [_facts(plan, final) for plan, final in jobs]
    steps = [_facts(plan, final) for plan, final in earlier]
    if as_json:
        whole = {**facts[0], "steps": steps} if steps else facts[0]
        echo_json(whole if len(facts) == 1 else {"plans": facts})
        return
    for job, one in zip(earlier, steps, strict=True):
        _show(job, one, quiet)
        if not quiet:
            click.echo(err=True)
    for job, one in zip(jobs, facts, strict=True):
        _show(job, one, quiet)


def _show(job: Planned, facts: dict[str, Any], quiet: bool) -> None:
    plan, final = job
    if not quiet:
        print_rows([*_plan(plan, facts), *note_rows(plan.adapters, plan.notes)])
    if final is not None:
        echo_path(final)


def _facts(plan: "Plan | Conversion", final: Path | None) -> dict[str, Any]:
    where = {"output": str(final)} if final else {}
    return {**where, **(_computing(plan) if isinstance(plan, Plan) else _converting(plan))}


def _converting(plan: "Conversion") -> dict[str, Any]:
    recipe = plan.record(UNKNOWN).recipe
    return {
        "method": recipe.method,
        "recipe": to_builtins(recipe),
        "layout": plan.layout.name,
        "rank": max(module.rank for module in plan.draft.modules),
        "folded": list(plan.folded),
        "scale_assumed": plan.original.scale_assumed,
        "notes": list(plan.notes),
        "modules": [
            {"name": module.name, "shape": list(module.shape), "rank": module.rank}
            for module in plan.draft.modules
        ],
    }


def _computing(plan: Plan) -> dict[str, Any]:
    return {
        "method": plan.recipe.method.name,
        "recipe": plan.recipe.canonical(),
        "layout": plan.layout.name,
        "dtype": plan.dtype,
        "rank": max(plan.ranks.values()),
        "rank_is_bound": plan.recipe.criterion is not None,
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.file_size(plan.ranks),
        "write_bytes_is_bound": plan.recipe.criterion is not None,
        "passes": plan.passes,
        "delta_bytes": _delta_bytes(plan),
        "scale_assumed": any(adapter.scale_assumed for adapter in plan.adapters),
        "notes": list(plan.notes),
        "modules": [
            {
                "name": module.name,
                "shape": list(module.model.shape),
                "ranks": list(module.ranks),
                "rank": plan.ranks[module.name],
            }
            for module in plan.alignment.modules
        ],
        "left_out": list(plan.alignment.left_out),
    }


def _delta_bytes(plan: Plan) -> int:
    """Bytes of the largest delta weight, where the method forms them; else 0."""
    if not plan.dense:
        return 0
    entry = ENTRY[plan.recipe.settings.compute_dtype]
    return max(entry * math.prod(module.model.shape) for module in plan.alignment.modules)


def _plan(plan: "Plan | Conversion", facts: dict[str, Any]) -> list[Row]:
    if not isinstance(plan, Plan):
        read = len(plan.original.modules)
        kept = len(plan.draft.modules) - len(plan.folded)
        return [
            Row("adapter", plan.original.reference),
            Row("layout", f"{plan.original.layout} -> {plan.layout.name}"),
            Row("modules", f"{read} of {read}"),
            Row("scale", f"kept in {kept} of {len(plan.draft.modules)} modules"),
            Row("plan", NOTHING),
        ]
    bound = "at most " if facts["rank_is_bound"] else ""
    shapes = Counter("x".join(map(str, m.model.shape)) for m in plan.alignment.modules)
    kinds = ", ".join(f"{count} of {shape}" for shape, count in shapes.most_common())
    passes = "one pass" if plan.passes == 1 else f"{plan.passes} passes"
    total = len(facts["modules"]) + len(facts["left_out"])
    written = f"{in_bytes(facts['write_bytes'])}, {DTYPES[plan.dtype]}"
    formed = f"every delta weight, the largest in {in_bytes(facts['delta_bytes'])} for each thread"
    return [
        Row("method", method_of(plan)),
        Row("adapters", inputs(plan)),
        Row("modules", f"{len(facts['modules'])} of {total}: {kinds}"),
        Row("rank", f"{ranks_in(plan)} -> {bound}{span(*_ends(plan))}"),
        *([Row("forms", formed)] if facts["delta_bytes"] else []),
        Row("reads", f"{in_bytes(plan.read_bytes)} in {passes}"),
        Row("writes", f"{bound}{written}, {plan.layout.name} layout"),
        Row("plan", NOTHING),
    ]


def _ends(plan: Plan) -> tuple[int, int]:
    return min(plan.ranks.values()), max(plan.ranks.values())
