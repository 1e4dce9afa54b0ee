"""A table over one option of a method: what each value would keep and cost, and nothing written."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loramerge.cli.command import Flag
from loramerge.errors import UsageError
from loramerge.options import Option
from loramerge.recipe import Named, flags, options_of
from loramerge.registry import Method

if TYPE_CHECKING:
    from loramerge.trials import Trial

__all__ = ["show_sweep", "sweep_flag"]

# What says where a result goes; a sweep has none.
ABOUT_RESULTS = ("push", "out", "out_dir", "force", "dry_run", "save_recipe", "report")


def sweep_flag(method: Method) -> list[Flag]:
    """The flag that asks for a table, where a method has something to sweep over."""
    if method.sweep is None:
        return []
    option = _option(method)
    return [
        Flag(
            "sweep",
            f"--sweep-{option.name}",
            "--sweep",
            metavar=f"{option.metavar},{option.metavar},...",
            help=f"Try these values of {option.flag}: print what each would keep and cost, and "
            "write nothing.",
        )
    ]


def show_sweep(
    name: str,
    method: Method,
    named: Sequence[Named],
    values: Mapping[str, object],
    wishes: Mapping[str, Any],
) -> None:
    """Compute the table and print it on stdout, or as JSON."""
    from loramerge.cli.inputs import opened
    from loramerge.cli.progress import progress
    from loramerge.cli.terminal import Row, print_rows, print_table
    from loramerge.cli.ui import echo_json, note_rows
    from loramerge.plan import make_plan
    from loramerge.trials import sweep, sweep_recipes

    if given := [key for key in ABOUT_RESULTS if wishes[key]]:
        raise UsageError(
            f"{name}: a sweep writes nothing; it takes no {flags(given)}.", "leave it out"
        )
    option = _option(method)
    recipes = sweep_recipes(name, named, values, _tried(option, wishes["sweep"]))
    adapters = opened(list(named))
    with progress(wishes["quiet"]) as listen:
        trials = sweep(recipes, adapters, listen)
    notes = make_plan(recipes[0], adapters).notes
    if wishes["json"]:
        facts = [_facts(option, trial) for trial in trials]
        about = {"method": method.name, "scale": recipes[0].scale, "notes": list(notes)}
        echo_json({**about, "option": option.name, "trials": facts})
        return
    print_table(*_table(option, trials))
    if not wishes["quiet"]:
        print_rows([Row("sweep", "nothing was written"), *note_rows(adapters, notes)])


def _option(method: Method) -> Option:
    assert method.sweep is not None
    return next(one for one in options_of(method) if one.name == method.sweep.option)


def _tried(option: Option, text: str) -> list[object]:
    """The values between commas, as numbers where they are; the option's declaration judges."""
    values: list[object] = []
    for word in text.split(","):
        try:
            values.append(int(word) if option.type is int else float(word))
        except ValueError:
            values.append(word)
    return values


def _facts(option: Option, trial: "Trial") -> dict[str, Any]:
    """One row for programs. A relative error that is infinite has no number in JSON."""
    low, high, mean = trial.rank
    finite = trial.relative_error != float("inf")
    return {
        option.name: trial.value,
        "rank": [low, high],
        "mean_rank": mean,
        "retained_energy": trial.energy,
        "relative_error": trial.relative_error if finite else None,
        **trial.figures,
        "factor": trial.scale,
        "parameters": trial.parameters,
        "bytes": trial.file_bytes,
    }


def _table(option: Option, trials: Sequence["Trial"]) -> tuple[list[str], list[list[str]]]:
    """The columns' names, and a row for each value."""
    from loramerge.cli.ui import in_bytes, percent, span

    head = [option.name, "rank", "mean", "energy", "error", *trials[0].figures]
    rows = [
        [
            f"{trial.value:g}",
            span(*trial.rank[:2]),
            f"{trial.rank[2]:.3g}",
            percent(trial.energy),
            f"{trial.relative_error:.3g}",
            *(f"{figure:.4g}" for figure in trial.figures.values()),
            f"{trial.parameters:,}",
            in_bytes(trial.file_bytes),
        ]
        for trial in trials
    ]
    return [*head, "parameters", "size"], rows
