"""A report as one page of HTML that needs nothing else: no script, nothing from elsewhere."""

from collections.abc import Iterable, Sequence
from html import escape

from loramerge.adapter import public_base, source_name
from loramerge.card import command_of
from loramerge.drawing import columns
from loramerge.report import ModuleReport, Report

__all__ = ["page"]

STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; }
.number { text-align: right; }
code, pre { font: .9rem ui-monospace, monospace; overflow-x: auto; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; }
"""


def page(report: Report) -> str:
    """Everything a report says, with a picture of the errors module by module."""
    plan, method = report.plan, report.plan.recipe.method
    title = f"{method.name}: {' + '.join(source_name(adapter) for adapter in plan.adapters)}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(method.summary)} {escape(method.paper)}</p>",
        f"<pre>{escape(command_of(plan.recipe, plan.adapters))}</pre>",
        _table((), _summary(report)),
        "<h2>Relative error of each module</h2>",
        columns({m.name: _drawn(m) for m in report.modules}, "relative error"),
        "<h2>Sources</h2>",
        _table(["source", "weight", "base model", "sha256"], _sources(report)),
        *_notes(report.notes),
        "<h2>Modules</h2>",
        _table(
            ["module", "ranks", "rank", "relative error", "retained energy"],
            map(_row, report.modules),
            numbers=3,
        ),
    ]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _drawn(module: ModuleReport) -> float:
    """The height of a column; an error beside a sum of zero has none."""
    return module.relative_error if module.target > 0 else 0.0


def _summary(report: Report) -> list[list[str]]:
    low, high = report.rank
    worst = report.worst
    return [
        ["modules", f"{report.merged} of {report.total}"],
        ["rank", f"{low}" if low == high else f"{low} to {high}"],
        ["retained energy", f"{report.energy:.6g}"],
        ["relative error", f"{report.relative_error:.4g} against {report.against}"],
        ["median module", f"{report.median_error:.4g}"],
        ["worst module", f"{worst.relative_error:.4g}, {worst.name}"],
        ["scale", f"{report.plan.recipe.scale}, factor {report.scale:.6g}"],
        ["file", f"{report.file_bytes:,} bytes, {report.tensors} tensors, {report.plan.dtype}"],
        ["tensors sha256", report.tensors_sha256],
        ["made with", ", ".join(f"{name} {one}" for name, one in report.versions.items())],
    ]


def _sources(report: Report) -> list[list[str]]:
    plan = report.plan
    return [
        [source_name(adapter), f"{named.weight:g}", public_base(adapter) or "not stated", digest]
        for adapter, named, digest in zip(
            plan.adapters, plan.recipe.adapters, report.sources_sha256, strict=True
        )
    ]


def _row(module: ModuleReport) -> list[str]:
    ranks = " + ".join(map(str, module.ranks))
    error, energy = f"{module.relative_error:.4g}", f"{module.energy:.6g}"
    return [module.name, ranks, str(module.rank), error, energy]


def _notes(notes: Sequence[str]) -> list[str]:
    if not notes:
        return []
    return ["<h2>Notes</h2>", "<ul>", *(f"<li>{escape(note)}</li>" for note in notes), "</ul>"]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 0) -> str:
    """A table whose last columns are numbers, aligned on the right."""
    lines = [_line("th", head, numbers), *(_line("td", row, numbers) for row in rows)]
    return "<table>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines if line) + "\n</table>"


def _line(kind: str, cells: Sequence[str], numbers: int) -> str:
    words = len(cells) - numbers
    return "".join(_cell(kind, cell, place >= words) for place, cell in enumerate(cells))


def _cell(kind: str, text: str, number: bool) -> str:
    return f"<{kind}{' class=number' if number else ''}>{escape(text)}</{kind}>"
