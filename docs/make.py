"""Draws the documentation from the declarations: one page per method, all help pages, a picture.

python docs/make.py            writes everything
python docs/make.py --check    fails where a page is not what would be written
"""

import argparse
import html
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from loramerge.cli import cli
from loramerge.io._foreign import FOREIGN
from loramerge.io._open import layouts
from loramerge.options import Option
from loramerge.recipe import options_of, same_as
from loramerge.registry import Method, methods
from loramerge.schema import recipe_schema
from loramerge.settings import GROUPS

DOCS = Path(__file__).parent
TESTBED = DOCS.parent / "fixtures" / "testbed" / "adapters"
PICTURE, HELP, SCHEMA = "report.svg", "cli.md", "recipe.schema.json"
WIDTH = 100
Measured = Mapping[tuple[str, str], float]
SCALES = ("paper", "auto", "norm", "ls")
# What the picture shows: typed in a directory with two adapters of the testbed.
TYPED = (
    ("loramerge cluster a.safetensors b.safetensors -k 16", "."),
    ("loramerge squeeze --rank 8", "a+b-k16"),
)


def method_page(method: Method) -> str:
    """One method: what it does, its paper, an example, presets, figures, every option."""
    lines = [f"# {method.name}", "", inspect.cleandoc(method.documentation), ""]
    lines += [f"Paper: {_link(method.paper)}", "", "```sh", method.example, "```"]
    for preset in method.presets:
        lines += ["", f"`{preset.name}` is `{same_as(method, preset)}`: {preset.summary}"]
        lines += [f"{preset.paper[0].upper()}{preset.paper[1:]}; {preset.traits}."]
    if method.sweep is not None:
        lines += ["", "What each of many values would keep and cost, without writing any:"]
        lines += ["", "```sh", method.sweep.example, "```"]
    lines += ["", *_traits(method)]
    measured = DOCS / "measured" / f"{method.name}.md"
    if measured.is_file():
        lines += ["", "## Measured", "", measured.read_text("utf-8").rstrip()]
    groups: dict[str, list[Option]] = {}
    for option in options_of(method):
        groups.setdefault(option.group or "Options of its own", []).append(option)
    for title in sorted(groups, key=lambda t: GROUPS.index(t) if t in GROUPS else -1):
        lines += ["", f"## {title}", "", "| option | values | default | |", "|---|---|---|---|"]
        lines += [_row(option) for option in groups[title]]
    lines += ["", "Inputs, outputs and switches are those of every command: [cli.md](../cli.md)."]
    return "\n".join(lines) + "\n"


def _traits(method: Method) -> list[str]:
    """What it needs and costs, and what measured its score."""
    traits = f"{method.traits[0].upper()}{method.traits[1:]}."
    if method.score is None:
        return [traits]
    return [traits, "", f"Exact match, {method.score.judged}: `{method.score.command}`"]


def _row(option: Option) -> str:
    flags = ", ".join(f"`{flag}`" for flag in (option.short, option.flag) if flag)
    unsaid = option.default in (None, ()) or option.default is False
    default = "" if unsaid else f"`{option.default}`"
    values = ", ".join(f"`{value}`" for value in [option.values] if value)
    limits = f"; {option.limits}" if option.limits else ""
    return f"| {flags} | {_cell(values + limits)} | {default} | {_cell(option.description)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _link(paper: str) -> str:
    number = paper.removeprefix("arXiv:")
    return f"[{paper}](https://arxiv.org/abs/{number})" if number != paper else paper


def cli_page() -> str:
    """Every help page, as the terminal shows it."""
    lines = ["# The command line", ""]
    names = cli.list_commands(_context(cli, "loramerge"))
    pages: list[tuple[str, click.Command]] = [("loramerge", cli)]
    for name in names:
        found = cli.get_command(_context(cli, "loramerge"), name)
        assert found is not None
        pages.append((f"loramerge {name}", found))
    for path, command in pages:
        text = command.get_help(_context(command, path))
        lines += [f"## {path}", "", "```text", text.rstrip(), "```", ""]
    return "\n".join(lines)


def _context(command: click.Command, path: str) -> click.Context:
    settings = {"help_option_names": ["-h", "--help"]}
    return click.Context(command, info_name=path, terminal_width=WIDTH, **settings)


def layouts_page() -> str:
    """What is read and written, and what is only recognised."""
    lines = ["# Layouts", "", "Read and written:", "", "| layout | |", "|---|---|"]
    lines += [f"| `{found.name}` | {_cell(found.summary)} |" for found in layouts()]
    lines += ["", "Recognised by their keys and refused by name:", "", "| layout | what to do |"]
    lines += ["|---|---|", *(f"| {foreign.name} | {_cell(foreign.hint)} |" for foreign in FOREIGN)]
    return "\n".join(lines) + "\n"


def quality_page() -> str:
    """What was measured, in tables, between the sentences of measured/quality.md."""
    rows = json.loads((DOCS / "measured" / "quality.json").read_text("utf-8"))["rows"]
    found = {(row["suite"], row["name"]): fmean(row["exact_match"]) for row in rows}
    bars = [
        [row["suite"], f"`{row['name']}`", _share(fmean(row["exact_match"])), _bar(row)]
        for row in rows
        if row["expected"] is not None
    ]
    four = {
        f"{said}, {scale}": f" --rank {rank} --scale {scale}"
        for said, rank in (("rank 16", 16), ("every rank", "full"))
        for scale in ("paper", "auto", "size")
    }
    kinds = {"shared A": "shared", "3e-4": "gentle", "ranks 4 to 32": "mixed"}
    drawn = {
        "hard": _measured(found, "hard", four),
        "easy": _measured(found, "easy", four),
        "own": _measured(found, "hard", {scale: f" --scale {scale}" for scale in SCALES}),
        "others": _suites(found, {**kinds, "two": "two", "four": "four"}),
        "alike": _suites(found, {"four copies": "copies", "two checkpoints": "run"}),
        "bars": _table(["", "", "measured", "bar"], bars),
    }
    page = (DOCS / "measured" / "quality.md").read_text("utf-8")
    for name, table in drawn.items():
        page = page.replace(f"{{{name}}}", table)
    return page


def _measured(found: Measured, suite: str, endings: Mapping[str, str]) -> str:
    """A row for each command of a suite, a column for each way it can end."""
    commands = {}
    for ending in endings.values():
        names = (name.removesuffix(ending) for one, name in found if one == suite)
        commands |= {name: None for name in names if (suite, name + ending) in found}
    kept = [one for one in commands if "--rank" not in one]
    rows = [
        [f"`{one}`", *(_share(found.get((suite, one + end))) for end in endings.values())]
        for one in kept
    ]
    return _table(["", *endings], rows)


def _suites(found: Measured, suites: Mapping[str, str]) -> str:
    """A row for each command at rank 16, a column for each suite."""
    names = {name: None for suite, name in found if suite in suites.values() and "--rank" in name}
    rows = [
        [
            f"`{name.replace(' --rank 16', '')}`",
            *(_share(found.get((suite, name))) for suite in suites.values()),
        ]
        for name in names
    ]
    return _table(["", *suites], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _share(exact: float | None) -> str:
    return "" if exact is None else f"{exact:.3f}".removeprefix("0")


def _bar(row: Mapping[str, Any]) -> str:
    if row["tolerance"] is None:
        return f"at least {_share(row['expected'])}"
    return f"{_share(row['expected'])} +- {_share(row['tolerance'])}"


def schema() -> str:
    """The JSON Schema of recipe files."""
    return json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"


def picture() -> str:
    """The report of the two commands everybody types first, as a terminal shows it."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    with tempfile.TemporaryDirectory() as directory:
        for name, source in (("a", "sh3_rev"), ("b", "sort_inter")):
            file = TESTBED / source / "adapter_model.safetensors"
            shutil.copyfile(file, Path(directory) / f"{name}.safetensors")
        for line, place in TYPED:
            console.print(Text(f"$ {line}", style="bold green"))
            for shown in _typed(line, Path(directory) / place):
                console.print(Text.from_ansi(shown))
    drawn = console.export_svg(title="loramerge", unique_id="loramerge")
    return re.sub(r"\s*@font-face \{.*?\}", "", drawn, flags=re.DOTALL)


def _typed(line: str, place: Path) -> list[str]:
    """What a line prints on a terminal: stderr first, then the path on stdout."""
    words = [sys.executable, "-m", *line.split()]
    env = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(WIDTH), "NO_COLOR": ""}
    done = subprocess.run(words, cwd=place, env=env, capture_output=True, text=True, check=True)
    return (done.stderr + done.stdout).splitlines()


def words_of(drawn: str) -> list[str]:
    """The plain words of a picture."""
    text = html.unescape(" ".join(re.findall(r"<text[^>]*>([^<]*)</text>", drawn)))
    return plain_words(text.replace("\xa0", " "))


def plain_words(report: str) -> list[str]:
    """The words of a report, numbers and module names aside: they differ between machines."""
    text = re.sub(r"\(model\.[\w.]+\)", "(module)", report)
    return re.sub(r"\d[\d.]*(e[-+]?\d+)?", "#", text).split()


def pages() -> dict[str, Callable[[], str]]:
    """Every generated file under docs, with what draws it."""
    found: dict[str, Callable[[], str]] = {
        f"methods/{method.name}.md": lambda method=method: method_page(method)
        for method in methods().values()
    }
    found |= {HELP: cli_page, "layouts.md": layouts_page, "quality.md": quality_page}
    return {**found, PICTURE: picture, SCHEMA: schema}


def same(name: str, drawn: str, stored: str) -> bool:
    """Whether a stored file still says what would be drawn.

    Of help pages the words count, not how a version of click breaks their lines.
    """
    if name == PICTURE:
        return words_of(drawn) == words_of(stored)
    return drawn.split() == stored.split() if name == HELP else drawn == stored


def stale(docs: Path, drawn: Mapping[str, str]) -> list[str]:
    """Files that are missing, differ, or belong to a method that is gone."""
    wrong = [
        name
        for name, text in drawn.items()
        if not (docs / name).is_file() or not same(name, text, (docs / name).read_text("utf-8"))
    ]
    kept = {path.relative_to(docs).as_posix() for path in (docs / "methods").glob("*.md")}
    return sorted([*wrong, *(kept - set(drawn))])


def write(docs: Path, drawn: Mapping[str, str]) -> None:
    """Write what differs and remove the pages of methods that are gone."""
    for name in stale(docs, drawn):
        path = docs / name
        if name in drawn:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(drawn[name], "utf-8")
        else:
            path.unlink()


def main() -> None:
    """Write, or with --check only tell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail where a page is stale")
    drawn = {name: draw() for name, draw in pages().items()}
    if not parser.parse_args().check:
        write(DOCS, drawn)
    elif names := stale(DOCS, drawn):
        sys.exit(f"stale: {', '.join(names)}; run: make docs")


if __name__ == "__main__":
    main()
