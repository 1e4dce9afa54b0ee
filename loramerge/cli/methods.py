"""One click command per method and preset, its flags made from the method's declarations."""

import inspect
from typing import Any

from loramerge.cli.command import Command, flag
from loramerge.cli.flags import (
    ANY_ADAPTERS,
    DRY_RUN,
    FORCE,
    INPUTS,
    OUT,
    OUT_DIR,
    REPORT,
    SAVE_RECIPE,
    SENDING,
    SHOWN,
    WEIGHT,
)
from loramerge.cli.sweep import sweep_flag
from loramerge.recipe import find, fixed, options_of, same_as
from loramerge.registry import Method, Preset

__all__ = ["command"]


def command(name: str) -> Command:
    """The command of a method or a preset."""
    method, preset = find(name)
    decided = fixed(preset)
    declared = [flag(option, hidden=option.name in decided) for option in options_of(method)]
    many = method.takes == "many"

    def callback(**given: Any) -> None:
        from loramerge.cli.jobs import run

        run(name, method, given)

    return Command(
        name,
        callback=callback,
        params=[
            ANY_ADAPTERS,
            *([WEIGHT] if many else []),
            *declared,
            *INPUTS,
            OUT,
            *([] if many else [OUT_DIR]),
            *_RESULT,
            *(sweep_flag(method) if preset is None else ()),
        ],
        help=_help(method, preset),
        short_help=preset.summary if preset else method.summary,
        example=f"loramerge {preset.name} a b" if preset else method.example,
    )


def _help(method: Method, preset: Preset | None) -> str:
    if preset is not None:
        words = f"The same as `loramerge {same_as(method, preset)}`"
        text = f"{preset.summary}\n\n{words}; see `loramerge {method.name} --help`."
    else:
        text = inspect.cleandoc(method.documentation)
    alone = "" if method.takes == "many" else f"\n\n{ALONE}"
    return f"{text}{alone}\n\n{method.paper}"


ALONE = (
    "Without ADAPTER: the adapter of this directory, where there is exactly one. "
    "Several ADAPTERs: one result each, in --out-dir."
)
_RESULT = (*SENDING, SAVE_RECIPE, REPORT, FORCE, DRY_RUN, *SHOWN)
