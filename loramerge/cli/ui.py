"""What the terminal shows: the plan, a progress bar, the report."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loramerge.events import Event, Listener, Started
from loramerge.plan import Plan
from loramerge.report import Report

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["progress", "show_plan", "show_report"]

# Work shorter than this shows no bar.
PATIENCE = 1.0
# Relative error that rounding both factors to a dtype costs, measured on random factors.
FLOOR = {"F32": 5e-8, "F16": 3e-4, "BF16": 2.4e-3}


@contextmanager
def progress(quiet: bool) -> Iterator[Listener]:
    """A listener that draws a bar on stderr once work has taken a second, on a terminal only."""
    if quiet or not sys.stderr.isatty():
        yield lambda event: None
        return
    bar = _Bar()
    try:
        yield bar.hear
    finally:
        bar.stop()


class _Bar:
    """A rich progress bar that is imported and drawn only when it is needed."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.stage, self.total, self.done = "", 0, 0
        self.drawn: Progress | None = None
        self.task: TaskID | None = None

    def hear(self, event: Event) -> None:
        """Count, and draw when it has become worth it."""
        if isinstance(event, Started):
            self.stage, self.total, self.done = event.stage, event.total, 0
            if self.drawn is not None:
                self.task = self.drawn.add_task(self.stage, total=self.total)
            return
        self.done += event.count
        if self.drawn is None and time.monotonic() - self.began > PATIENCE:
            self._draw()
        if self.drawn is not None and self.task is not None:
            self.drawn.update(self.task, completed=min(self.done, self.total))

    def _draw(self) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self.drawn = Progress(console=Console(stderr=True), transient=True)
        self.task = self.drawn.add_task(self.stage, total=self.total)
        self.drawn.start()

    def stop(self) -> None:
        """Take the bar away."""
        if self.drawn is not None:
            self.drawn.stop()


def show_report(report: Report, final: Path, *, as_json: bool, quiet: bool) -> None:
    """The result on stdout, everything about it on stderr."""
    if as_json:
        click.echo(json.dumps({"output": str(final), **report.as_json()}, ensure_ascii=False))
        return
    if not quiet:
        _table(_rows(report), [*report.notes], any(a.scale_assumed for a in report.plan.adapters))
    click.echo(str(final))


def _rows(report: Report) -> list[tuple[str, str]]:
    plan = report.plan
    low, high = report.rank
    into = str(high) if low == high else f"{low} to {high}"
    floor = FLOOR[plan.dtype]
    exact = report.worst.relative_error <= 2 * floor
    rows = [
        ("method", f"{plan.recipe.method.name}  {plan.recipe.method.paper}"),
        ("modules", f"{report.merged} of {report.total} merged, {report.tensors} tensors"),
        ("rank", f"{_ranks_in(report)} -> {into}"),
        ("retained energy", f"{report.energy:.2%}"),
        (
            "relative error",
            f"{report.relative_error:.3g}  (median {report.median_error:.3g}; worst "
            f"{report.worst.relative_error:.3g} in {report.worst.name})",
        ),
        (
            "",
            f"rounding to {plan.dtype} alone costs about {floor:g}"
            + ("; nothing else was lost" if exact else ""),
        ),
    ]
    if plan.scaled:
        others = ", ".join(f"{name} {value:.3g}" for name, value in report.others.items())
        rows.append(("scale", f"{plan.recipe.scale}: x{report.scale:.3g}  (would be: {others})"))
    size = f"{report.file_bytes / 1e6:.2f} MB {plan.dtype}"
    rows.append(
        ("written", f"{size}, re-read and verified, {report.seconds:.2f} s on {report.device}")
    )
    return rows


def _ranks_in(report: Report) -> str:
    columns = [
        sorted({member.rank for m in report.plan.alignment.modules if (member := m.members[i])})
        for i in range(len(report.plan.adapters))
    ]
    return " + ".join(str(c[0]) if len(c) == 1 else f"{c[0]}..{c[-1]}" for c in columns if c)


def _table(rows: list[tuple[str, str]], notes: list[str], warn_last: bool) -> None:
    width = max(len(name) for name, _ in rows)
    colour = sys.stderr.isatty()
    for name, value in rows:
        label = click.style(f"{name:>{width}}", bold=True) if colour else f"{name:>{width}}"
        click.echo(f"{label}  {value}", err=True)
    for note in notes:
        assumed = warn_last and "scale 1" in note
        text = f"{'note':>{width}}  {note}"
        click.echo(click.style(text, fg="yellow") if colour and assumed else text, err=True)


def show_plan(plan: Plan, final: Path, as_json: bool) -> None:
    """What would be done, from headers alone."""
    facts: dict[str, Any] = {
        "output": str(final),
        "method": plan.recipe.method.name,
        "layout": plan.layout.name,
        "modules": len(plan.alignment.modules),
        "rank": max(plan.ranks.values()),
        "rank_is_bound": plan.recipe.criterion is not None,
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.file_size(plan.ranks),
        "dtype": plan.dtype,
        "passes": 2 if plan.surveyed else 1,
        "notes": list(plan.notes),
    }
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
        return
    rank = ("at most " if facts["rank_is_bound"] else "") + str(facts["rank"])
    rows = [
        ("method", facts["method"]),
        ("modules", str(facts["modules"])),
        ("rank", rank),
        (
            "reads",
            f"{plan.read_bytes / 1e6:.2f} MB, passes over the data: {facts['passes']}",
        ),
        ("writes", f"{facts['write_bytes'] / 1e6:.2f} MB {plan.dtype} ({plan.layout.name} layout)"),
    ]
    _table(rows, list(plan.notes), any(a.scale_assumed for a in plan.adapters))
    click.echo(str(final))
