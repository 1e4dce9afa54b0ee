"""The compare command: several methods on the same adapters, in one table."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loramerge.cli.command import Command, Flag, Words, flag, those_set
from loramerge.cli.flags import ADAPTERS, FORCE, INPUTS, SAVE_RECIPE, SHOWN, WEIGHT
from loramerge.cli.saving import save_recipe
from loramerge.errors import UsageError
from loramerge.options import describe
from loramerge.registry import methods
from loramerge.settings import OUTPUT, MergeSettings

if TYPE_CHECKING:
    from loramerge.comparison import Compared

__all__ = ["COMMANDS"]

USUAL = "arithmetic,ties,tsv,cluster"
# Of what it takes, all that is no setting of a merge.
OWN = (
    "adapters",
    "methods",
    "weight",
    "alpha",
    "from_",
    "keep",
    "save_recipe",
    "force",
    "json",
    "quiet",
)
EXAMPLE = "loramerge compare a b --methods arithmetic,ties"


def compare(**given: Any) -> None:
    """Merge adapters by several methods, and show what each would keep, in one table.

    Every module is read once for all methods, each at its own defaults but for the settings given
    here, and for what stands behind its name: ties:density=0.5 is ties at that density, and
    tsv:rank=8:lambda=0.7 has two options of its own. One method can have several rows.

    Energy and error are against the exact weighted sum, before rounding to the stored dtype: a
    method that does more than add is far from the sum by intent, so that these tell methods apart,
    and not which is better. Seconds are those of all threads together.

    Nothing is written, unless --keep names a directory: then each merge is stored there under its
    name, and --save-recipe writes down how.
    """
    from loramerge._spool import Spool
    from loramerge.cli import ui
    from loramerge.cli.inputs import named_adapters, opened
    from loramerge.cli.progress import progress
    from loramerge.cli.terminal import Row, print_rows, print_table
    from loramerge.comparison import compare_methods, entries, recipes
    from loramerge.compute import own_process
    from loramerge.document import recipe_document
    from loramerge.io._hub import fetch
    from loramerge.plan import make_plan
    from loramerge.publish import destination, publish

    own_process()
    wishes = {key: given.pop(key) for key in OWN}
    kept, saved = wishes["keep"], wishes["save_recipe"]
    if kept is None and saved is not None:
        raise UsageError(
            "compare writes nothing, of which there could be a recipe.",
            "say where to store the merges: --keep merges",
        )
    values = those_set(given)
    inputs = named_adapters(wishes["adapters"], wishes["weight"], wishes["alpha"], wishes["from_"])
    rows = entries(wishes["methods"])
    asked = recipes(rows, inputs, values)
    adapters = opened(inputs)
    plans = [make_plan(recipe, adapters) for recipe in asked]
    outs = [] if kept is None else [str(Path(kept, row.name.replace(":", "-"))) for row in rows]
    places = [
        destination(plan, out, wishes["force"]) for plan, out in zip(plans, outs, strict=False)
    ]
    steps = [
        recipe_document(row.method, inputs, {**values, **row.values}, out)
        for row, out in zip(rows, outs, strict=False)
    ]
    save_recipe(saved, steps, places, wishes["force"])
    with ExitStack() as stack:
        spools = [stack.enter_context(Spool()) for _ in places]
        listen = stack.enter_context(progress(wishes["quiet"]))
        fetch(adapters, listen)
        found = compare_methods(rows, plans, spools, listen)
        for one, place in zip(found, places, strict=False):
            publish(one.plan, place, wishes["force"], listen, one.computed)
    notes = _notes(found)
    if wishes["json"]:
        facts = [_facts(one) for one in found]
        ui.echo_json({"methods": facts, "outputs": list(map(str, places)), "notes": notes})
        return
    print_table(*_table(found), words=1)
    if not wishes["quiet"]:
        done = f"written to {kept}" if kept is not None else "nothing was written"
        print_rows([Row("compared", done), *ui.note_rows(adapters, notes)])


def _notes(found: Sequence["Compared"]) -> list[str]:
    """What is to be said of all rows, then of single ones."""
    told: list[str] = []
    for note in dict.fromkeys(note for one in found for note in one.plan.notes):
        names = [one.entry.name for one in found if note in one.plan.notes]
        told.append(note if len(names) == len(found) else f"{', '.join(names)}: {note}")
    return told


def _facts(one: "Compared") -> dict[str, Any]:
    """One row for programs. A relative error that is infinite has no number in JSON."""
    low, high, mean = one.trial.rank
    finite = one.trial.relative_error != float("inf")
    recipe = one.plan.recipe
    return {
        "name": one.entry.name,
        "recipe": recipe.canonical(),
        "rank": [low, high],
        "mean_rank": mean,
        "retained_energy": one.trial.energy,
        "relative_error": one.trial.relative_error if finite else None,
        "scale": {"used": recipe.scale, "factor": one.trial.scale},
        "seconds": one.seconds,
        "bytes": one.trial.file_bytes,
    }


def _table(found: Sequence["Compared"]) -> tuple[list[str], list[list[str]]]:
    """The columns' names, and a row for each method."""
    from loramerge.cli.ui import in_bytes, percent, span

    rows = [
        [
            one.entry.name,
            span(*one.trial.rank[:2]),
            percent(one.trial.energy),
            f"{one.trial.relative_error:.3g}",
            f"{one.plan.recipe.scale} x{one.trial.scale:.3g}",
            f"{one.seconds:.2f}",
            in_bytes(one.trial.file_bytes),
        ]
        for one in found
    ]
    return ["method", "rank", "energy", "error", "scale", "seconds", "size"], rows


def _merges() -> list[str]:
    """Every method and preset that merges."""
    able = [one for one in methods().values() if one.merges]
    return [name for one in able for name in (one.name, *(p.name for p in one.presets))]


COMMANDS: dict[str, click.Command] = {
    "compare": Command(
        "compare",
        callback=compare,
        params=[
            ADAPTERS,
            Flag(
                "methods",
                "--methods",
                type=Words(_merges),
                metavar="NAME[:KEY=VALUE],...",
                default=USUAL,
                help="Methods and presets to try, with options of their own behind a colon each: "
                f"ties,ties:density=0.5.  [default: {USUAL}]",
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
            SAVE_RECIPE,
            FORCE,
            *SHOWN,
        ],
        help=compare.__doc__,
        short_help="Merge by several methods and show them in one table.",
        example=EXAMPLE,
    )
}
