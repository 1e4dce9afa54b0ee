"""What is printed: the result on stdout, the report on stderr."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loramerge.adapter import Adapter
from loramerge.cli.terminal import Row, print_rows
from loramerge.compute import FLOOR
from loramerge.linalg.calibrations import PAPERS
from loramerge.plan import Plan
from loramerge.report import SCHEMA_VERSION, Report

if TYPE_CHECKING:
    from loramerge.converted import Converted
    from loramerge.io._hub_push import Pushed

__all__ = [
    "DTYPES",
    "Results",
    "echo_json",
    "echo_path",
    "in_bytes",
    "inputs",
    "method_of",
    "note_rows",
    "percent",
    "pushed",
    "ranks_in",
    "span",
]

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# An error up to this many floors is rounding: float32 arithmetic before the cast adds its own.
SLACK = 4


def echo_json(facts: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    click.echo(json.dumps({"schema_version": SCHEMA_VERSION, **facts}, allow_nan=False))


def echo_path(path: Path) -> None:
    """The path of a result on stdout, as the system spells it."""
    click.echo(os.fsencode(path))


def in_bytes(count: int) -> str:
    """A size as people read it: 999 B, 556 kB, 1.12 MB, 84 MB."""
    for unit, power in (("B", 0), ("kB", 3), ("MB", 6)):
        if count < 999.5 * 10**power:
            return f"{count / 10**power:.3g} {unit}"
    return f"{count / 1e9:,.2f} GB"


class Results:
    """Results as they come: reports on stderr and paths on stdout, or one JSON object at the end.

    In JSON a `batch` is a list under `results`, however many there are.
    """

    def __init__(self, *, batch: bool, as_json: bool, quiet: bool) -> None:
        self.batch, self.as_json, self.quiet = batch, as_json, quiet
        self.facts: list[dict[str, Any]] = []
        self.steps: list[dict[str, Any]] = []

    def step(self, report: "Report | Converted", final: Path | None) -> None:
        """Show the result of a step before the last: where it is, or what it is kept as."""
        if self.as_json:
            where = {"output": str(final)} if final else {}
            self.steps.append({**where, **report.as_json()})
            return
        kept = [] if final else [Row("kept", f"for the next step, {_kept(report)}")]
        if not self.quiet:
            print_rows([*_rows(report), *kept, *note_rows(report.plan.adapters, report.notes)])
        if final:
            echo_path(final)
        if not self.quiet:
            click.echo(err=True)

    def add(self, report: "Report | Converted", final: Path, sent: "Pushed | None" = None) -> None:
        """Show one result, and where on the Hub it was sent to."""
        warning = _assumption(report.plan.adapters)
        if self.as_json:
            where = {"output": str(final), **({"pushed": sent.url} if sent else {})}
            self.facts.append({**where, **report.as_json()})
            if warning and not self.quiet:
                print_rows([warning])
            return
        if not self.quiet:
            notes = note_rows(report.plan.adapters, report.notes)
            print_rows([*_rows(report), *pushed(sent), *notes])
        echo_path(final)

    def close(self) -> None:
        """Print what waited for the end."""
        if self.as_json:
            steps = {"steps": self.steps} if self.steps else {}
            echo_json({"results": self.facts} if self.batch else {**self.facts[0], **steps})


def _kept(report: "Report | Converted") -> str:
    if not isinstance(report, Report):
        return f"in the layout {report.plan.layout.name}"
    dtype = DTYPES[report.plan.dtype]
    return f"as {dtype}{'' if dtype == 'float32' else ' (save_dtype: float32 keeps more)'}"


def _rows(report: "Report | Converted") -> list[Row]:
    return _report(report) if isinstance(report, Report) else _converted(report)


def _converted(done: "Converted") -> list[Row]:
    plan = done.plan
    kept = len(plan.draft.modules) - len(plan.folded)
    return [
        Row("adapter", plan.original.reference),
        Row("layout", f"{plan.original.layout} -> {plan.layout.name}"),
        Row("coverage", done.coverage),
        Row("scale", f"kept in {kept} of {len(plan.draft.modules)} modules"),
        Row(
            "written",
            f"{in_bytes(done.file_bytes)}, {done.tensors} tensors; re-read and verified",
        ),
    ]


def _tensors(plan: Plan) -> str:
    """How much of what the adapters store is in the result."""
    return "{} of {} tensors".format(*plan.coverage)


def _report(report: Report) -> list[Row]:
    plan = report.plan
    method = plan.recipe.method
    done = "kept" if method.surgery else "merged" if method.takes == "many" else "compressed"
    size = f"{in_bytes(report.file_bytes)}, {report.tensors} tensors, {DTYPES[plan.dtype]}"
    rows = [
        Row("method", method_of(plan)),
        Row("adapters", inputs(plan)),
        Row("modules", f"{report.merged} of {report.total} {done}, {_tensors(plan)}"),
        Row("rank", f"{ranks_in(plan)} -> {_ranks_out(report)}"),
        Row("retained energy", percent(report.energy)),
        Row(
            "relative error",
            f"{report.relative_error:.3g} against {report.against}; median module "
            f"{report.median_error:.3g}, worst {report.worst.relative_error:.3g} "
            f"({report.worst.name})",
        ),
        Row("rounding", _rounding(report)),
    ]
    if report.condition is not None:
        rows.append(Row("condition", f"{report.condition:.3g} in the worst module"))
    if method.takes == "many":
        rows.append(Row("scale", _scale(report)))
    rows.append(Row("written", f"{size}, {plan.layout.name} layout; re-read and verified"))
    rows.append(Row("took", f"{report.seconds:.2f} s on {report.device}"))
    return rows


def method_of(plan: Plan) -> str:
    """The method and its paper, and the calibration with its own, where there is one."""
    name, paper = plan.recipe.method.name, plan.recipe.method.paper
    calibration = plan.recipe.merge.calibrate
    by = f"; calibrated by {calibration}, {PAPERS[calibration]}" if calibration else ""
    return f"{name}, {paper}{by}"


def pushed(sent: "Pushed | None") -> list[Row]:
    """Where on the Hub a result was sent to."""
    if sent is None:
        return []
    return [Row("pushed", sent.url if sent.changed else f"{sent.url}, where it was already")]


def inputs(plan: Plan) -> str:
    """The weighted sum as it was asked for: 1 x a + -0.5 x b, or a + b."""
    names = [_name(adapter) for adapter in plan.adapters]
    weights = [named.weight for named in plan.recipe.adapters]
    if set(weights) == {1.0}:
        return " + ".join(names)
    return " + ".join(f"{w:g} x {name}" for w, name in zip(weights, names, strict=True))


def _name(adapter: Adapter) -> str:
    """A reference as it was typed; of `.` the directory's name."""
    here = adapter.reference in (".", "./")
    return f"{Path().resolve().name}/" if here else adapter.reference


def ranks_in(plan: Plan) -> str:
    """Each adapter's rank, or the span of its ranks."""
    columns = [
        sorted({member.rank for m in plan.alignment.modules if (member := m.members[i])})
        for i in range(len(plan.adapters))
    ]
    return " + ".join(span(c[0], c[-1]) if c else "none" for c in columns)


def _ranks_out(report: Report) -> str:
    kept = span(*report.rank)
    stored = max(module.stored_rank for module in report.modules)
    return f"{kept}, stored as {stored}" if report.padded else kept


def span(low: int, high: int) -> str:
    """4..16, or 16 where both ends are the same."""
    return str(low) if low == high else f"{low}..{high}"


def percent(share: float) -> str:
    """A share with as many nines as it has, up to 99.9999 %: rounding alone costs less."""
    if share >= 1 - 5e-7:
        return "100 %"
    digits = next(d for d in range(2, 5) if d == 4 or round(100 * share, d) < 100)
    return f"{100 * share:.{digits}f} %"


def _rounding(report: Report) -> str:
    dtype, floor = DTYPES[report.plan.dtype], FLOOR[report.plan.dtype]
    if report.worst.relative_error <= SLACK * floor:
        return f"nothing was lost beyond rounding to {dtype} (usually {floor:g})"
    return f"of this, storing {dtype} costs about {floor:g}"


def _scale(report: Report) -> str:
    """The policy and its factor, and what every other policy would have given."""
    recipe = report.plan.recipe
    used = recipe.scale
    factor = f", times lambda {recipe.merge.lambda_:g}" if recipe.merge.lambda_ != 1 else ""
    if not isinstance(used, str):
        return f"x{used:g}, as asked for{factor}"
    if not report.plan.scaled:
        return f"{used}{factor}"
    others = ", ".join(f"{name} x{x:.3g}" for name, x in report.others.items() if name != used)
    return f"{used} x{report.others[used]:.3g}{factor} (would be: {others})"


def note_rows(adapters: Sequence[Adapter], notes: Sequence[str]) -> list[Row]:
    """What was dropped, padded, left out; in yellow what destroys, and last an assumed scale."""
    warning = _assumption(adapters)
    assumed = (note for a in adapters if a.scale_assumed for note in a.assumed)
    told = tuple(f": {note}" for note in assumed if note.startswith("scale 1:"))
    rows = [_note(note) for note in notes if not note.endswith(told)]
    return [*rows, warning] if warning else rows


def _note(note: str) -> Row:
    text = note.removeprefix("warning: ")
    return Row("note", note) if text == note else Row("warning", text, fg="yellow")


def _assumption(adapters: Sequence[Adapter]) -> Row | None:
    unsaid = list(dict.fromkeys(a.reference for a in adapters if a.scale_assumed))
    if not unsaid:
        return None
    says = "does not say its" if len(unsaid) == 1 else "do not say their"
    text = f"scale 1: {', '.join(unsaid)} {says} alpha (--alpha N sets it)"
    return Row("assumed", text, fg="yellow")
