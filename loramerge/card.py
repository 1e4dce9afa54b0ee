"""The model card of a result: sources, method, measured error, how to load it."""

import json

from loramerge.adapter import source_name
from loramerge.report import Report, public_base

__all__ = ["card"]

WORST = 5


def card(report: Report) -> str:
    """README.md of an output directory, with the front matter the Hub reads."""
    plan = report.plan
    base = _only({public_base(adapter) for adapter in plan.adapters})
    front = ["library_name: peft", "tags:", "- lora", "- merge", "- loramerge"]
    if base:
        front = [f"base_model: {base}", "base_model_relation: adapter", *front]
    method = plan.recipe.method
    lines = ["---", *front, "---", "", "# Model card", ""]
    lines += [
        f"Made by loramerge with `{method.name}` ({_link(method.paper)}): {method.summary}",
        "",
    ]
    lines += ["| source | weight | sha256 |", "|---|---|---|"]
    for adapter, named, digest in zip(
        plan.adapters, plan.recipe.adapters, report.sources_sha256, strict=True
    ):
        lines.append(f"| {source_name(adapter)} | {named.weight:g} | `{digest[:16]}` |")
    options = {**plan.recipe.canonical()["options"], "scale": plan.recipe.scale}
    lines += ["", f"Options: `{json.dumps(options, sort_keys=True)}`", ""]
    low, high = report.rank
    rank = f"{high}" if low == high else f"{low} to {high}"
    lines += [
        f"Rank {rank}, {len(report.modules)} modules, stored as {plan.dtype}. Measured on the file "
        "as written, against the exact weighted sum of the sources:",
        "",
        "| | relative error | retained energy |",
        "|---|---|---|",
        f"| whole adapter | {report.relative_error:.3g} | {report.energy:.2%} |",
        f"| median module | {report.median_error:.3g} | |",
    ]
    worst = sorted(report.modules, key=lambda m: (-m.relative_error, m.name))[:WORST]
    lines += [f"| `{m.name}` | {m.relative_error:.3g} | {m.energy:.2%} |" for m in worst]
    if report.notes:
        lines += ["", *(f"- {note}" for note in report.notes)]
    if plan.layout.name == "peft":
        lines += ["", "```python", "from peft import PeftModel", ""]
        lines += ['model = PeftModel.from_pretrained(base_model, "path/to/this/directory")', "```"]
    return "\n".join(lines) + "\n"


def _only(values: set[str | None]) -> str | None:
    return next(iter(values)) if len(values) == 1 else None


def _link(paper: str) -> str:
    number = paper.removeprefix("arXiv:")
    return f"[{paper}](https://arxiv.org/abs/{number})" if number != paper else paper
