"""The compare command: several methods on the same adapters, in one table."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loramerge.cli.command import Command, Flag, Words, flag, those_set
from loramerge.cli.flags import ADAPTERS, FORCE, INPUTS, SHOWN, WEIGHT
from loramerge.options import describe
from loramerge.registry import methods
from loramerge.settings import OUTPUT, MergeSettings

if TYPE_CHECKING:
    from loramerge.comparison import Compared

__all__ = ["COMMANDS"]

USUAL = "arithmetic,ties,tsv,cluster"
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
    name.
    """
    from loramerge._spool import Spool
    from loramerge.cli import ui
    from loramerge.cli.inputs import named_adapters, opened
    from loramerge.cli.progress import progress
    from loramerge.cli.terminal import Row, print_rows, print_table
    from loramerge.comparison import compare_methods, entries, recipes
    from loramerge.compute import own_process
    from loramerge.io._hub import fetch
    from loramerge.plan import make_plan
    from loramerge.publish import destination, publish

    own_process()
    own = ("adapters", "methods", "weight", "alpha", "from_", "keep", "force", "json", "quiet")
    wishes = {key: given.pop(key) for key in own}
    values = those_set(given)
    inputs = named_adapters(wishes["adapters"], wishes["weight"], wishes["alpha"], wishes["from_"])
    rows = entries(wishes["methods"])
    asked = recipes(rows, inputs, values)
    adapters = opened(inputs)
    plans = [make_plan(recipe, adapters) for recipe in asked]
    kept = wishes["keep"]
    places = [
        destination(plan, str(Path(kept, row.name.replace(":", "-"))), wishes["force"])
        for row, plan in zip(rows, plans, strict=True)
        if kept is not None
    ]
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
    many = [one for one in methods().values() if one.takes == "many"]
    return [name for one in many for name in (one.name, *(p.name for p in one.presets))]


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
            FORCE,
            *SHOWN,
        ],
        help=compare.__doc__,
        short_help="Merge by several methods and show them in one table.",
        example=EXAMPLE,
    )
}
