"""The model card of a result: sources, method, measured error, how to load it."""

import json
import re
import shlex
from collections.abc import Sequence
from urllib.parse import quote

import msgspec

from loramerge.adapter import Adapter, pinned_name, public_base, source_name
from loramerge.recipe import Recipe, options_of
from loramerge.report import ModuleReport, Report

__all__ = ["PLACE", "card", "command_of", "converted_card", "plain_card"]

WORST = 5
HUB = "https://huggingface.co"
# Where the files are, in the lines that load them, until they have a place on the Hub.
PLACE = "path/to/this/directory"
DIFFUSERS = f"""```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(base_model)
pipeline.load_lora_weights("{PLACE}")
```"""
# How a layout is loaded by its own library; mlx_lm takes adapters from a disk alone.
LOADS = {
    "peft": f"""```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "{PLACE}")
```""",
    "kohya": DIFFUSERS,
    "diffusers": DIFFUSERS,
    "mlx": """```python
from mlx_lm import load

model, tokenizer = load(base_model, adapter_path="where/it/is")
```""",
}
AGAIN = f"From these sources, `loramerge reproduce {PLACE}` makes it again, and compares."
# The libraries that the Hub knows for layouts.
LIBRARIES = {"peft": "peft", "kohya": "diffusers", "diffusers": "diffusers", "mlx": "mlx"}


def card(report: Report) -> str:
    """README.md of an output directory, with the front matter the Hub reads."""
    plan = report.plan
    method = plan.recipe.method
    parts = [
        _front_matter(plan.adapters, plan.layout.name, ["lora", "merge", "loramerge"]),
        f"# A LoRA adapter made with loramerge {method.name}",
        f"{method.summary} {_link(method.paper)}",
        _sources(report),
        f"```sh\n{command_of(plan.recipe, plan.adapters)}\n```",
        *([] if any(adapter.derived for adapter in plan.adapters) else [AGAIN]),
        _summary(report),
        _errors(report),
    ]
    if notes := report.notes:
        parts.append("\n".join(f"- {_escaped(note)}" for note in notes))
    return "\n\n".join([*parts, *_load(plan.layout.name)]) + "\n"


def converted_card(
    adapter: Adapter, layout: str, typed: Sequence[str], sha256: str, said: Sequence[str]
) -> str:
    """README.md of an adapter in another layout: from what, how, and what is `said` of it."""
    parts = [
        _front_matter([adapter], layout, ["lora", "loramerge"]),
        f"# A LoRA adapter, converted to {layout} with loramerge",
        f"The same updates as {_source(adapter)}, sha256 `{sha256}`, in the {layout} layout.",
        f"```sh\n{_line(shlex.join(typed))}\n```",
        "\n".join(f"- {_escaped(line)}" for line in said),
        *_load(layout),
    ]
    return "\n\n".join(parts) + "\n"


def plain_card(adapter: Adapter) -> str:
    """README.md of an adapter that has none: what its files say."""
    rank = f"rank {adapter.max_rank}, {len(adapter.modules)} modules"
    parts = [
        _front_matter([adapter], adapter.layout, ["lora"]),
        f"# A LoRA adapter of {rank}",
        *_load(adapter.layout),
    ]
    return "\n\n".join(parts) + "\n"


def _load(layout: str) -> list[str]:
    return [LOADS[layout]] if layout in LOADS else []


def _front_matter(adapters: Sequence[Adapter], layout: str, tags: list[str]) -> str:
    """What the Hub reads: base model and licence only where all adapters agree on them."""
    bases = {public_base(adapter) for adapter in adapters}
    terms = {adapter.licence for adapter in adapters}
    base = bases.pop() if len(bases) == 1 else None
    licence = terms.pop() if len(terms) == 1 else None
    lines = []
    if base:
        # A JSON string is a YAML string, whatever it holds.
        lines += [f"base_model: {json.dumps(base)}", "base_model_relation: adapter"]
    if layout in LIBRARIES:
        lines.append(f"library_name: {LIBRARIES[layout]}")
    if licence:
        lines.append(f"license: {json.dumps(licence)}")
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _link(paper: str) -> str:
    number = paper.removeprefix("arXiv:")
    return f"([{paper}](https://arxiv.org/abs/{number}))" if number != paper else f"({paper})"


def _sources(report: Report) -> str:
    plan = report.plan
    rows = [
        f"| {_source(adapter)} | {named.weight:g} | `{digest}` |"
        for adapter, named, digest in zip(
            plan.adapters, plan.recipe.adapters, report.sources_sha256, strict=True
        )
    ]
    return "\n".join(["| source | weight | sha256 |", "|---|---|---|", *rows])


def _source(adapter: Adapter) -> str:
    """Its name and licence; on the Hub with a link to its file at its commit."""
    name, origin = _escaped(source_name(adapter)), adapter.origin
    if origin:
        page = f"{HUB}/{origin.repository}/blob/{origin.revision}/{quote(origin.path)}"
        name = f"[{name}]({page}) at `{origin.revision}`"
    return f"{name}, {_escaped(adapter.licence)}" if adapter.licence else name


def command_of(recipe: Recipe, adapters: Sequence[Adapter]) -> str:
    """The command that makes this result again, with what is not a default."""
    typed = adapters[0].derived or (recipe.method.name, *map(pinned_name, adapters))
    words = ["loramerge", *typed]
    weights = [named.weight for named in recipe.adapters]
    if set(weights) != {1.0}:
        words += [word for weight in weights for word in ("-w", f"{weight:.17g}")]
    alphas = [named.alpha for named in recipe.adapters if named.alpha is not None]
    if len(alphas) == len(weights):
        words += [word for alpha in alphas for word in ("--alpha", f"{alpha:.17g}")]
    if any(named.layout is not None for named in recipe.adapters):
        words += [word for named in recipe.adapters for word in ("--from", named.layout or "auto")]
    for option in options_of(recipe.method):
        home = recipe.options if hasattr(recipe.options, option.name) else recipe.settings
        value = getattr(home, option.name)
        if option.name != "device" and value != _default(type(home), option.name):
            for one in value if option.repeated else [value]:
                if one is True:
                    words.append(option.flag)
                    continue
                words += [option.flag, f"{one:.17g}" if isinstance(one, float) else str(one)]
    return _line(shlex.join(words))


def _default(options: type[msgspec.Struct], name: str) -> object:
    return next(f.default for f in msgspec.structs.fields(options) if f.name == name)


def _summary(report: Report) -> str:
    low, high = report.rank
    rank = f"{high}" if low == high else f"{low} to {high}"
    factor = f", scaled by {report.scale:.6g}" if report.scale != 1 else ""
    return (
        f"{report.merged} of {report.total} modules, rank {rank}, stored as {report.plan.dtype}"
        f"{factor}. Measured on the file as written, against {report.against}:"
    )


def _errors(report: Report) -> str:
    rows = [
        "| | relative error | retained energy |",
        "|---|---|---|",
        f"| whole adapter | {report.relative_error:.3g} | {report.energy:.6g} |",
        f"| median module | {report.median_error:.3g} | |",
    ]
    worst = sorted(report.modules, key=lambda m: (-m.relative_error, m.name))[:WORST]
    return "\n".join([*rows, *map(_row, worst)])


def _row(module: ModuleReport) -> str:
    return f"| {_escaped(module.name)} | {module.relative_error:.3g} | {module.energy:.6g} |"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", _line(text))


def _line(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
