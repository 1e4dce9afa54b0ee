"""The compare command: several methods on the same adapters, in one table."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loramerge.cli.command import Command, Flag, flag
from loramerge.cli.flags import ADAPTERS, FORCE, INPUTS, SHOWN, WEIGHT
from loramerge.options import describe
from loramerge.settings import OUTPUT, MergeSettings

if TYPE_CHECKING:
    from loramerge.comparison import Compared

__all__ = ["COMMANDS"]

USUAL = "arithmetic,ties,tsv,cluster"
EXAMPLE = "loramerge compare a b --methods arithmetic,ties"


def compare(**given: Any) -> None:
    """Merge adapters by several methods, and show what each would keep, in one table.

    Every module is read once for all methods, each at its own defaults but for the settings given
    here. Energy and error are against the exact weighted sum, before rounding to the stored dtype:
    a method that does more than add is far from the sum by intent, so that these tell methods
    apart, and not which is better. Seconds are those of all threads together.

    Nothing is written, unless --keep names a directory: then each method's merge is computed again
    and stored there under its name.
    """
    from loramerge.cli import ui
    from loramerge.cli.inputs import named_adapters, opened
    from loramerge.cli.progress import progress
    from loramerge.cli.terminal import Row, print_rows, print_table
    from loramerge.comparison import compare_methods, recipes
    from loramerge.compute import own_process
    from loramerge.plan import make_plan
    from loramerge.publish import destination, publish

    own_process()
    own = ("adapters", "methods", "weight", "alpha", "from_", "keep", "force", "json", "quiet")
    wishes = {key: given.pop(key) for key in own}
    values = {key: value for key, value in given.items() if value is not None and value != ()}
    inputs = named_adapters(wishes["adapters"], wishes["weight"], wishes["alpha"], wishes["from_"])
    names = [name for name in wishes["methods"].split(",") if name]
    asked = recipes(names, inputs, values)
    adapters = opened(inputs)
    plans = [make_plan(recipe, adapters) for recipe in asked]
    kept = wishes["keep"]
    places = [
        destination(plan, str(Path(kept) / name), wishes["force"])
        for name, plan in zip(names, plans, strict=True)
        if kept is not None
    ]
    with progress(wishes["quiet"]) as listen:
        found = compare_methods(names, asked, adapters, listen)
    for plan, place in zip(plans, places, strict=False):
        with progress(wishes["quiet"]) as listen:
            publish(plan, place, wishes["force"], listen)
    notes = plans[0].notes
    if wishes["json"]:
        outputs = [str(place) for place in places]
        ui.echo_json(
            {"methods": [_facts(one) for one in found], "outputs": outputs, "notes": list(notes)}
        )
        return
    print_table(*_table(found))
    if not wishes["quiet"]:
        done = f"written to {kept}" if kept is not None else "nothing was written"
        print_rows([Row("compared", done), *ui.note_rows(adapters, notes)])


def _facts(one: "Compared") -> dict[str, Any]:
    """One row for programs. A relative error that is infinite has no number in JSON."""
    low, high, mean = one.trial.rank
    finite = one.trial.relative_error != float("inf")
    return {
        "name": one.name,
        "recipe": one.recipe.canonical(),
        "rank": [low, high],
        "mean_rank": mean,
        "retained_energy": one.trial.energy,
        "relative_error": one.trial.relative_error if finite else None,
        "scale": {"used": one.recipe.scale, "factor": one.trial.scale},
        "seconds": one.seconds,
        "bytes": one.trial.file_bytes,
    }


def _table(found: Sequence["Compared"]) -> tuple[list[str], list[list[str]]]:
    """The columns' names, and a row for each method."""
    from loramerge.cli.ui import in_bytes, percent, span

    rows = [
        [
            one.name,
            span(*one.trial.rank[:2]),
            percent(one.trial.energy),
            f"{one.trial.relative_error:.3g}",
            f"{one.recipe.scale} x{one.trial.scale:.3g}",
            f"{one.seconds:.2f}",
            in_bytes(one.trial.file_bytes),
        ]
        for one in found
    ]
    return ["method", "rank", "energy", "error", "scale", "seconds", "size"], rows


COMMANDS: dict[str, click.Command] = {
    "compare": Command(
        "compare",
        callback=compare,
        params=[
            ADAPTERS,
            Flag(
                "methods",
                "--methods",
                metavar="NAME,NAME,...",
                default=USUAL,
                help=f"Methods and presets to try.  [default: {USUAL}]",
            ),
            WEIGHT,
            *(flag(option) for option in describe(MergeSettings)),
            *INPUTS,
            Flag(
                "keep",
                "--keep",
                group=OUTPUT,
                type=click.Path(),
                metavar="DIR",
                help="Store each merge in this directory, under the name of its method.",
            ),
            FORCE,
            *SHOWN,
        ],
        help=compare.__doc__,
        short_help="Merge by several methods and show them in one table.",
        example=EXAMPLE,
    )
}
