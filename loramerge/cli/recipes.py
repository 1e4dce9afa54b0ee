"""Recipe files: run the steps of one."""

import tempfile
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loramerge.cli.command import PICKLES, Command, Flag
from loramerge.cli.flags import (
    ALLOW_PICKLE,
    DEVICE,
    DRY_RUN,
    FORCE,
    OUT,
    REPORT,
    SAVE_RECIPE,
    SENDING,
    SHOWN,
)
from loramerge.cli.reporting import page_place, write_page
from loramerge.cli.sending import sending
from loramerge.errors import UsageError

if TYPE_CHECKING:
    from loramerge.adapter import Adapter
    from loramerge.io._yaml import Value
    from loramerge.plan import Plan
    from loramerge.workflow import Workflow

__all__ = ["COMMANDS"]


def run(
    recipe: str,
    assigned: tuple[str, ...],
    out: str | None,
    save_recipe: str | None,
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
    from loramerge.chain import plans
    from loramerge.cli import ui
    from loramerge.cli.inputs import opened
    from loramerge.cli.planned import show_plans
    from loramerge.cli.progress import progress
    from loramerge.compute import own_process
    from loramerge.io._hub import fetch
    from loramerge.io._write import write_text
    from loramerge.io._yaml import write_yaml
    from loramerge.publish import destination, publish
    from loramerge.result import Result, compute
    from loramerge.workflow import make_workflow

    own_process()
    push = sending("run", **told)
    document = _document(recipe, assigned)
    workflow = make_workflow(document, recipe)
    adapters = opened(workflow.sources, look=dry_run)
    out = out or workflow.output
    planned, final = _planned(workflow, adapters, out, force)
    place = page_place("run", report, None, force)
    if save_recipe and isinstance(document, dict):
        write_text(Path(save_recipe).expanduser(), write_yaml(document), force)
    if dry_run:
        show_plans([(planned[-1], final)], as_json=json, quiet=quiet, earlier=planned[:-1])
        return
    if push is not None:
        push.check()
    shown = ui.Results(batch=False, as_json=json, quiet=quiet)
    kept: list[Result] = []
    with progress(quiet) as listen:

        def made(plan: "Plan") -> "Adapter":
            result, report = compute(plan, listen)
            kept.append(result)
            shown.step(report)
            return result.adapter

        try:
            fetch(adapters, listen)
            *_, plan = plans(workflow, adapters, made)
            # Ranks that were bounds are known now, and may be part of a default name.
            final = destination(plan, out, force)
            done = publish(plan, final, force, listen)
        finally:
            kept.clear()
    sent = push.send(done, final, quiet) if push else None
    write_page(place, done, force)
    shown.add(done, final, sent)
    shown.close()


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
) -> tuple[list["Plan"], Path]:
    """Every step as a plan, and a place for the last result that replaces none of the inputs."""
    from loramerge.chain import outline, plans
    from loramerge.publish import destination

    with tempfile.TemporaryDirectory(prefix="loramerge-") as directory:
        count = iter(range(len(workflow.steps)))
        found = list(
            plans(workflow, adapters, lambda plan: outline(plan, Path(directory, str(next(count)))))
        )
    final = destination(found[-1], out, force)
    for plan in found[:-1]:
        destination(plan, str(final), force)
    return found, final


def reproduce(
    output: str,
    sources: tuple[str, ...],
    out: str | None,
    save_recipe: str | None,
    force: bool,
    device: str | None,
    json: bool,
    quiet: bool,
    **told: Any,
) -> None:
    """Make a result again from its own record, and say whether it is the same.

    A result holds in its header the recipe and the sha256 of every source. Sources are found by
    name beside OUTPUT, here or in --sources, or by their sha256 there, or on the Hub at the
    recorded revision; results of earlier steps are made again where they are gone. Sources that
    changed are refused. On the same kind of machine with the same versions every bit must be the
    same; elsewhere 1 unit in the last place of the stored dtype, or 1e-6 of any delta weight, is
    allowed. Exit code 3 beyond that. A single file does not tell where it was made: for one, the
    latter is allowed everywhere.
    """
    from loramerge.cli.progress import progress
    from loramerge.cli.terminal import Row, print_rows
    from loramerge.cli.ui import echo_json, pushed
    from loramerge.compute import own_process
    from loramerge.reproduce import reproduce

    own_process()
    push = sending("reproduce", **told)
    if push is not None:
        if out is None:
            raise UsageError(
                "reproduce --push sends what -o keeps.", "say where to keep it too: -o again"
            )
        push.check()
    places = [Path(place).expanduser() for place in sources]
    with progress(quiet) as listen:
        allowed = click.get_current_context().meta[PICKLES]
        verdict = reproduce(
            output,
            places,
            out,
            force,
            device,
            listen,
            allow_pickle=allowed,
            save_recipe=Path(save_recipe).expanduser() if save_recipe else None,
        )
    sent = push.send(verdict.made, Path(out).expanduser(), quiet) if push and out else None
    if json:
        facts = {"ulps": verdict.ulps, "relative": verdict.relative, "same": verdict.same}
        where = {"output": out or output, **({"pushed": sent.url} if sent else {})}
        echo_json({**where, **facts, **verdict.made.as_json()})
        return
    if not quiet:
        rows = [
            Row("reproduced", verdict.text),
            Row("recipe", verdict.made.as_json()["recipe"]["method"]),
        ]
        print_rows([*rows, *pushed(sent)])
    click.echo(out or output)


def _show_schema(context: click.Context, param: click.Parameter, wanted: bool) -> None:
    """Print the JSON Schema of recipes and leave."""
    if wanted and not context.resilient_parsing:
        from loramerge.schema import recipe_schema

        click.echo(dumps(recipe_schema(), indent=1, ensure_ascii=False))
        context.exit()


COMMANDS: dict[str, Command] = {
    "run": Command(
        "run",
        callback=run,
        params=[
            click.Argument(["recipe"], type=click.Path()),
            Flag(
                "assigned",
                "--set",
                multiple=True,
                metavar="KEY=VALUE",
                help="Set a value of the recipe: rank=8, steps[1].rank=8; repeatable.",
            ),
            ALLOW_PICKLE,
            OUT,
            *SENDING,
            SAVE_RECIPE,
            REPORT,
            FORCE,
            DRY_RUN,
            *SHOWN,
            Flag(
                "--schema",
                is_flag=True,
                is_eager=True,
                expose_value=False,
                callback=_show_schema,
                help="Print the JSON Schema of recipes, for editors.",
            ),
        ],
        help=run.__doc__,
        short_help="Run the steps of a recipe file.",
        example="loramerge run recipe.yaml --set steps[1].rank=8",
    ),
    "reproduce": Command(
        "reproduce",
        callback=reproduce,
        params=[
            click.Argument(["output"], type=click.Path()),
            Flag(
                "sources",
                "--sources",
                type=click.Path(),
                multiple=True,
                metavar="DIR",
                help="Where sources are, if not beside OUTPUT; repeatable.",
            ),
            ALLOW_PICKLE,
            OUT.saying("Where to keep what is made again.  [default: nowhere]"),
            *SENDING,
            SAVE_RECIPE.saying("Write down how OUTPUT is made, as a recipe for `loramerge run`."),
            FORCE,
            *SHOWN,
            DEVICE.saying("auto, cpu or cuda[:N].  [default: the recorded one]"),
        ],
        help=reproduce.__doc__,
        short_help="Make a result again from its record, and compare.",
        example="loramerge reproduce merged -o again",
    ),
}
