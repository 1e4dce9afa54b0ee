"""One click command per method and preset, its flags made from the method's declarations."""

import inspect
from typing import Any

import click

from loramerge.cli.flags import Command, Flag, flag
from loramerge.cli.sweep import sweep_flag
from loramerge.recipe import find, fixed, options_of, same_as
from loramerge.registry import Method, Preset
from loramerge.settings import INPUT, MERGE, OUTPUT

__all__ = ["OUT", "SWITCHES", "command"]


def command(name: str) -> Command:
    """The command of a method or a preset."""
    method, preset = find(name)
    decided = fixed(preset)
    declared = [
        flag(option, group=f"Options of {name}", hidden=option.name in decided)
        for option in options_of(method)
    ]
    many = method.takes == "many"

    def callback(**given: Any) -> None:
        from loramerge.cli.jobs import run

        run(name, method, given)

    return Command(
        name,
        callback=callback,
        params=[
            _ADAPTERS,
            *(_WEIGHTS if many else ()),
            *declared,
            *_OUTPUT[method.takes],
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
# Not required by click: a missing adapter is found, or refused with an example, by the recipe.
_ADAPTERS = click.Argument(
    ["adapters"], nargs=-1, required=False, type=click.Path(), metavar="ADAPTER..."
)
_WEIGHTS = (
    Flag(
        ["weight", "-w", "--weight"],
        group=MERGE,
        type=float,
        multiple=True,
        metavar="X",
        help="Weight of each adapter, in their order; may be negative.  [default: 1 each]",
    ),
)
_ALPHA = Flag(
    ["alpha", "--alpha"],
    group=INPUT,
    type=float,
    multiple=True,
    metavar="X",
    help="lora_alpha, for bare files that do not say it: once for all adapters, or once for each.",
)
OUT = Flag(
    ["out", "-o", "--out"],
    group=OUTPUT,
    type=click.Path(),
    metavar="PATH",
    help="Output directory, or one file where it ends in .safetensors.  "
    "[default: a name made of the inputs, here]",
)
_OUT_DIR = Flag(
    ["out_dir", "--out-dir"],
    group=OUTPUT,
    type=click.Path(),
    metavar="DIR",
    help="Directory for the results of several adapters.",
)
_PUSH = Flag(
    ["push", "--push"],
    group=OUTPUT,
    metavar="USER/REPO",
    help="Send the result to the Hub too, with its card; the repository is made if need be.",
)
SWITCHES = (
    Flag(
        ["save_recipe", "--save-recipe"],
        group=OUTPUT,
        type=click.Path(),
        metavar="FILE",
        help="Write this command line as a recipe for `loramerge run`.",
    ),
    Flag(
        ["force", "-f", "--force"],
        group=OUTPUT,
        is_flag=True,
        help="Replace an existing output.",
    ),
    Flag(
        ["dry_run", "--dry-run"],
        group=OUTPUT,
        is_flag=True,
        help="Show the plan; read headers only, write nothing.",
    ),
    Flag(
        ["json", "--json"],
        group=OUTPUT,
        is_flag=True,
        help="Print the report as JSON on stdout.",
    ),
    Flag(
        ["quiet", "-q", "--quiet"],
        group=OUTPUT,
        is_flag=True,
        help="Print only the output path.",
    ),
)
_OUTPUT = {
    "many": (_ALPHA, OUT, _PUSH, *SWITCHES),
    "one": (_ALPHA, OUT, _OUT_DIR, _PUSH, *SWITCHES),
}
