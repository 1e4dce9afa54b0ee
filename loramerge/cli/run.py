"""The run command: the steps of a recipe file, planned whole, then computed."""

import tempfile
from itertools import count
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
    from loramerge.chain import Places, Stage
    from loramerge.cli.ui import Results
    from loramerge.converted import Converted
    from loramerge.events import Listener
    from loramerge.io._yaml import Value
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
    directory. Everything is planned before the first tensor is read. The last result is written,
    and that of every step with an output; what only a later step takes stays in a temporary
    directory. docs/recipes.md has examples.
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
    workflow = workflow.ending(out) if out else workflow
    planned = _planned(workflow, adapters, force)
    place = page_place("run", report, None, force)
    if place is not None and isinstance(planned[-1].plan, Conversion):
        raise UsageError(
            "run --report shows what a method has measured, and the last step is convert.",
            "leave out --report; --json prints what was done",
        )
    if push is not None and not dry_run:
        push.check()
    if isinstance(document, dict):
        save_recipe(saved, [document], [one.final for one in planned], force)
    if dry_run:
        *earlier, last = [(one.plan, one.final if one.written else None) for one in planned]
        show_plans([last], as_json=json, quiet=quiet, earlier=earlier)
        return
    shown = ui.Results(batch=False, as_json=json, quiet=quiet)
    with progress(quiet) as listen:
        done, final = _computed(workflow, adapters, force, shown, listen)
    sent = push.send(done, final, quiet) if push else None
    if isinstance(done, Report):
        write_page(place, done, force)
    shown.add(done, final, sent)
    shown.close()


def _computed(
    workflow: "Workflow",
    adapters: list["Adapter"],
    force: bool,
    shown: "Results",
    listen: "Listener",
) -> tuple["Report | Converted", Path]:
    """Compute every step, and show those before the last."""
    from loramerge.chain import stages
    from loramerge.conversion import Conversion
    from loramerge.converted import convert
    from loramerge.io._hub import fetch
    from loramerge.publish import publish

    def done(stage: "Stage") -> "Report | Converted":
        if isinstance(stage.plan, Conversion):
            return convert(stage.plan, listen)
        return publish(stage.plan, stage.final, force, listen)

    def made(stage: "Stage") -> "Adapter":
        shown.step(done(stage), stage.final if stage.written else None)
        return stage.result()

    fetch(adapters, listen)
    with tempfile.TemporaryDirectory(prefix="loramerge-") as held:
        # Ranks that were bounds are known now, and may be part of a default name.
        *_, last = stages(workflow, adapters, _places(held, force), made)
        return done(last), last.final


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


def _planned(workflow: "Workflow", adapters: list["Adapter"], force: bool) -> list["Stage"]:
    """Every step as a plan, with a place for what is written that replaces none of the inputs."""
    from loramerge.chain import outline, stages

    with tempfile.TemporaryDirectory(prefix="loramerge-") as directory:
        outlines = (Path(directory, f"outline-{number}") for number in count())
        return list(
            stages(
                workflow,
                adapters,
                _places(directory, force),
                lambda stage: outline(stage, next(outlines)),
            )
        )


def _places(held: str, force: bool) -> "Places":
    from loramerge.chain import Places

    return Places(Path(held), force, click.get_current_context().meta[PICKLES])
