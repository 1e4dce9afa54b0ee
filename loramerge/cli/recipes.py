"""Recipe files: run the steps of one, and make again what has one in its header."""

from json import dumps
from pathlib import Path
from typing import Any

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
from loramerge.cli.run import run
from loramerge.cli.sending import sending
from loramerge.errors import UsageError

__all__ = ["COMMANDS"]


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
            OUT.saying(
                "Where the last result goes.  [default: what the recipe says, or a name made of "
                "the inputs, here]"
            ),
            *SENDING,
            SAVE_RECIPE.saying("Write the recipe down as it is run, with what was --set."),
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
