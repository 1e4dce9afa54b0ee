"""The convert command: the same adapter in another layout."""

from typing import TYPE_CHECKING

import click

from loramerge.cli.command import Command, Flag
from loramerge.cli.flags import ADAPTER, FORCE, INPUTS, OUT, SHOWN
from loramerge.cli.terminal import Row, print_rows

if TYPE_CHECKING:
    from loramerge.convert import Converted

__all__ = ["COMMANDS"]


def convert(
    adapter: str,
    to: str,
    alpha: tuple[float, ...],
    from_: tuple[str, ...],
    initial: str | None,
    extras: str,
    out: str | None,
    force: bool,
    json: bool,
    quiet: bool,
) -> None:
    """Write an adapter in another layout: factors bit for bit, names translated.

    The scale is written where the layout has a place for it; otherwise it is folded into B, in
    float32, once, and the report says so. What the layout has no place for (heads, biases, token
    rows) is refused by name, or left out with --extras drop. The file is read back and must hold
    the same modules and scales.

    PiSSA, OLoRA, CorDA and LoRA-GA change their base when training starts. With --initial, the
    adapter as it was saved before training, the result is a plain LoRA against the true base,
    exactly, at twice the rank (squeeze it).
    """
    from loramerge.cli import ui
    from loramerge.cli.inputs import named_adapters, opened
    from loramerge.cli.progress import progress
    from loramerge.compute import own_process
    from loramerge.conversion import plan_conversion
    from loramerge.convert import convert as converted
    from loramerge.derive import rebased

    own_process()
    both = [adapter] if initial is None else [adapter, initial]
    source, *start = opened(named_adapters(both, (), alpha, from_))
    if start:
        source = rebased(source, *start)
    plan = plan_conversion(source, to, out, extras=extras, force=force)
    with progress(quiet) as listen:
        done = converted(plan, listen)
    if json:
        ui.echo_json({"output": str(plan.final), **done.as_json()})
        return
    if not quiet:
        _show(done)
    ui.echo_path(plan.final)


def _show(done: "Converted") -> None:
    from loramerge.cli import ui

    plan = done.plan
    kept = len(plan.draft.modules) - len(plan.folded)
    written = f"{ui.in_bytes(done.file_bytes)}, {done.tensors} tensors; re-read and verified"
    rows = [
        Row("adapter", plan.original.reference),
        Row("layout", f"{plan.original.layout} -> {plan.layout.name}"),
        Row("coverage", done.coverage),
        Row("scale", f"kept in {kept} of {len(plan.draft.modules)} modules"),
        Row("written", written),
    ]
    print_rows([*rows, *ui.note_rows([plan.original], done.notes)])


COMMANDS: dict[str, click.Command] = {
    "convert": Command(
        "convert",
        callback=convert,
        params=[
            ADAPTER,
            Flag(
                "to",
                "--to",
                required=True,
                metavar="LAYOUT",
                help="The layout to write: peft, kohya, diffusers, comfy, mlx, ... "
                "(loramerge layouts).",
            ),
            Flag(
                "initial",
                "--initial",
                type=click.Path(),
                metavar="ADAPTER",
                help="The adapter before it was trained, where its start changed the base (PiSSA).",
            ),
            Flag(
                "extras",
                "--extras",
                type=click.Choice(["error", "drop"]),
                default="error",
                help="What happens to tensors that the layout cannot hold.  [default: error]",
            ),
            *INPUTS,
            OUT,
            FORCE,
            *SHOWN,
        ],
        help=convert.__doc__,
        short_help="Write an adapter in another layout, bit for bit.",
        example="loramerge convert my-adapter --to mlx",
    ),
}
