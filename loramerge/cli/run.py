"""The run command: the steps of a recipe file, planned whole, then computed."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loramerge.cli.command import PICKLES
from loramerge.cli.reporting import page_place, write_page
from loramerge.cli.saving import save_recipe
from loramerge.cli.sending import sending
from loramerge.errors import UsageError

if TYPE_CHECKING:
    from loramerge.adapter import Adapter
    from loramerge.chain import Places
    from loramerge.cli.ui import Results
    from loramerge.conversion import Conversion
    from loramerge.converted import Converted
    from loramerge.events import Listener
    from loramerge.io._yaml import Value
    from loramerge.plan import Plan
    from loramerge.report import Report
    from loramerge.workflow import Workflow

__all__ = ["run"]


def run(
    recipe: str,
    assigned: tuple[str, ...],
    out: str | None,
    report: str | None,
    force: bool,
    dry_run: bool,
    json: bool,
    quiet: bool,
    **told: Any,
) -> None:
    """Run the steps of a recipe file: merge, squeeze, prune, each on what came before.

    A recipe is YAML (or JSON) with the names of flags: method, adapters with their weights,
    options, output; or several of these as steps. Paths in it are relative to the current
    directory. Everything is planned before the first tensor is read; results that only a later
    step takes stay in a temporary directory. docs/recipes.md has examples.
    """
    from loramerge.cli import ui
    from loramerge.cli.inputs import opened
    from loramerge.cli.planned import show_plans
    from loramerge.cli.progress import progress
    from loramerge.compute import own_process
    from loramerge.conversion import Conversion
    from loramerge.report import Report
    from loramerge.workflow import make_workflow

    own_process()
    saved = told.pop("save_recipe")
    push = sending("run", **told)
    document = _document(recipe, assigned)
    workflow = make_workflow(document, recipe)
    adapters = opened(workflow.sources, look=dry_run)
    out = out or workflow.output
    planned, final = _planned(workflow, adapters, out, force)
    place = page_place("run", report, None, force)
    if place is not None and isinstance(planned[-1], Conversion):
        raise UsageError(
            "run --report shows what a method has measured, and the last step is convert.",
            "leave out --report; --json prints what was done",
        )
    if isinstance(document, dict):
        save_recipe(saved, document, force)
    if dry_run:
        show_plans([(planned[-1], final)], as_json=json, quiet=quiet, earlier=planned[:-1])
        return
    if push is not None:
        push.check()
    shown = ui.Results(batch=False, as_json=json, quiet=quiet)
    with progress(quiet) as listen:
        done, final = _computed(workflow, adapters, (out, force), shown, listen)
    sent = push.send(done, final, quiet) if push else None
    if isinstance(done, Report):
        write_page(place, done, force)
    shown.add(done, final, sent)
    shown.close()


def _computed(
    workflow: "Workflow",
    adapters: list["Adapter"],
    wishes: tuple[str | None, bool],
    shown: "Results",
    listen: "Listener",
) -> tuple["Report | Converted", Path]:
    """Compute every step, and show those before the last."""
    from loramerge.chain import converted_adapter, place_of, plans
    from loramerge.conversion import Conversion
    from loramerge.converted import convert
    from loramerge.io._hub import fetch
    from loramerge.publish import publish
    from loramerge.result import Result, compute

    out, force = wishes
    kept: list[Result] = []

    def made(plan: "Plan | Conversion") -> "Adapter":
        if isinstance(plan, Conversion):
            shown.step(convert(plan, listen))
            return converted_adapter(plan)
        result, report = compute(plan, listen)
        kept.append(result)
        shown.step(report)
        return result.adapter

    with tempfile.TemporaryDirectory(prefix="loramerge-") as held:
        try:
            fetch(adapters, listen)
            *_, plan = plans(workflow, adapters, _places(out, held, force), made)
            # Ranks that were bounds are known now, and may be part of a default name.
            final = place_of(plan, out, force)
            if isinstance(plan, Conversion):
                return convert(plan, listen), final
            return publish(plan, final, force, listen), final
        finally:
            kept.clear()


def _document(recipe: str, assigned: tuple[str, ...]) -> "Value":
    """The recipe file with --set KEY=VALUE applied."""
    from loramerge.document import assign
    from loramerge.io._yaml import read_text, read_yaml

    document = read_yaml(read_text(Path(recipe).expanduser()), recipe)
    for item in assigned:
        key, equals, text = item.partition("=")
        if not equals:
            raise UsageError(f"--set {item} has no value.", f"for example: --set {key}=8")
        assign(document, key, read_yaml(text, f"--set {key}"))
    return document


def _planned(
    workflow: "Workflow", adapters: list["Adapter"], out: str | None, force: bool
) -> tuple[list["Plan | Conversion"], Path]:
    """Every step as a plan, and a place for the last result that replaces none of the inputs."""
    from loramerge.chain import outline, place_of, plans
    from loramerge.publish import free_place

    with tempfile.TemporaryDirectory(prefix="loramerge-") as directory:
        count = iter(range(len(workflow.steps)))
        found = list(
            plans(
                workflow,
                adapters,
                _places(out, directory, force),
                lambda plan: outline(plan, Path(directory, str(next(count)))),
            )
        )
    final = place_of(found[-1], out, force)
    for plan in found[:-1]:
        free_place(plan.adapters, str(final), force)
    return found, final


def _places(out: str | None, held: str, force: bool) -> "Places":
    from loramerge.chain import Places

    return Places(out, Path(held), force, click.get_current_context().meta[PICKLES])
