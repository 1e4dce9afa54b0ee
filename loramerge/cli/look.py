"""Commands that only look: what there is, and what is installed."""

from typing import TYPE_CHECKING, Any

import click

from loramerge.cli.command import Command
from loramerge.cli.diff import DIFF
from loramerge.cli.flags import JSON
from loramerge.cli.inspect import INSPECT
from loramerge.cli.similar import SIMILAR
from loramerge.cli.terminal import Row, print_rows

if TYPE_CHECKING:
    from loramerge.registry import Method, Preset

__all__ = ["COMMANDS"]


def _echo(facts: dict[str, Any]) -> None:
    from loramerge.cli.ui import echo_json

    echo_json(facts)


def methods(json: bool) -> None:
    """List every method: what it does, its paper, what it needs and costs, how it scored."""
    from loramerge.recipe import same_as
    from loramerge.registry import methods as registered

    found = registered().values()
    if json:
        rows = [
            {
                **_said_of(method),
                "takes": method.takes,
                "example": method.example,
                "needs": method.needs,
                "presets": [
                    {**_said_of(preset), "values": dict(preset.values)} for preset in method.presets
                ],
            }
            for method in found
        ]
        _echo({"methods": rows})
        return
    shown: list[Row] = []
    for method in found:
        shown.append(Row(method.name, method.summary))
        shown.append(Row("", f"{method.paper}; {method.example}"))
        shown.append(Row("", method.traits))
        for preset in method.presets:
            shown.append(Row(preset.name, f"= {same_as(method, preset)}: {preset.summary}"))
            shown.append(Row("", f"{preset.paper}; {preset.traits}"))
    print_rows(shown, err=False)


def _said_of(one: "Method | Preset") -> dict[str, Any]:
    score = one.score
    return {
        "name": one.name,
        "summary": one.summary,
        "paper": one.paper,
        "place": one.place,
        "cost": one.cost,
        "exact_match": score and score.exact_match,
        "of": score and score.judged,
        "measured_by": score and score.command,
    }


def layouts(json: bool) -> None:
    """List the layouts that are read and written, and those only recognised."""
    from loramerge.io._foreign import FOREIGN
    from loramerge.io._open import layouts as known

    refused = [foreign.name for foreign in FOREIGN]
    if json:
        rows = [{"name": found.name, "summary": found.summary} for found in known()]
        _echo({"read": rows, "recognised": refused})
        return
    shown = [Row(found.name, found.summary) for found in known()]
    names = f"recognised, and refused by name: {', '.join(refused)}"
    print_rows([*shown, Row("others", names)], err=False)


PACKAGES = (
    "loramerge",
    "numpy",
    "torch",
    "safetensors",
    "huggingface-hub",
    "msgspec",
    "click",
    "rich",
)


def env(json: bool) -> None:
    """Show versions and devices, for a bug report."""
    import os
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from loramerge.compute import accelerator

    def found(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    facts = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        **{package: found(package) for package in PACKAGES},
        "accelerator": accelerator(),
    }
    if json:
        _echo(facts)
        return
    rows = [Row(key, "none" if value is None else str(value)) for key, value in facts.items()]
    print_rows(rows, err=False)


def _command(callback: Any) -> Command:
    name = callback.__name__
    return Command(
        name,
        callback=callback,
        params=[JSON],
        help=callback.__doc__,
        example=f"loramerge {name}",
    )


COMMANDS: dict[str, click.Command] = {
    "inspect": INSPECT,
    "diff": DIFF,
    "similar": SIMILAR,
    "methods": _command(methods),
    "layouts": _command(layouts),
    "env": _command(env),
}
