"""The convert command: the same adapter in another layout."""

from typing import TYPE_CHECKING, Any

import click

from loramerge.cli.command import LAYOUT, PICKLES, Command, Flag, Words
from loramerge.cli.flags import ADAPTER, FORCE, INPUTS, OUT, SENDING, SHOWN
from loramerge.cli.sending import sending
from loramerge.cli.terminal import Row, print_rows
from loramerge.errors import UsageError
from loramerge.registry import layout_names

if TYPE_CHECKING:
    from loramerge.converted import Converted
    from loramerge.io._names import Projections

__all__ = ["COMMANDS"]


def convert(
    adapter: str,
    to: str,
    alpha: tuple[float, ...],
    from_: tuple[str, ...],
    shared: str | None,
    initial: str | None,
    base: str | None,
    pruned: tuple[str, ...],
    heads: str | None,
    projections: "Projections | None",
    rename: tuple[str, ...],
    extras: str,
    out: str | None,
    force: bool,
    json: bool,
    quiet: bool,
    **told: Any,
) -> None:
    """Write an adapter in another layout: factors bit for bit, names translated.

    The scale is written where the layout has a place for it; otherwise it is folded into B, in
    float32, once, and the report says so. What the layout has no place for (heads, biases, token
    rows) is refused by name, or left out with --extras drop. The file is read back and must hold
    the same modules and scales.

    PiSSA, OLoRA, CorDA and LoRA-GA change their base when training starts. With --initial, the
    adapter as it was saved before training, the result is a plain LoRA against the true base,
    exactly, at twice the rank (squeeze it). For PiSSA by full SVD and for OLoRA, --base is enough.

    An adapter trained on a pruned model (LoRAM) becomes one of the whole model with --pruned, the
    index files of the pruning. One that keeps some of its factors elsewhere (LoRA-XS, Fed-SB, VeRA)
    is completed from --shared.
    """
    from loramerge.cli import ui
    from loramerge.cli.inputs import named_adapters, opened
    from loramerge.cli.progress import progress
    from loramerge.compute import own_process
    from loramerge.conversion import plan_conversion
    from loramerge.converted import convert as converted
    from loramerge.io._checkpoint import open_checkpoint
    from loramerge.io._hub import fetch
    from loramerge.needs import Needs

    own_process()
    push = sending("convert", **told)
    both = [adapter] if initial is None else [adapter, initial]
    source, *start = opened(named_adapters(both, (), alpha, from_), shared=shared)
    needs = Needs(
        initial=start[0] if start else None,
        base=open_checkpoint(base) if base is not None else None,
        pruned=pruned,
        heads=_heads(heads),
        projections=projections,
        renames=tuple(map(_renaming, rename)),
        allow_pickle=click.get_current_context().meta[PICKLES],
    )
    plan = plan_conversion(source, to, out, extras=extras, force=force, needs=needs)
    if push is not None:
        push.check()
    with progress(quiet) as listen:
        fetch([source, *start], listen)
        done = converted(plan, listen)
    sent = push.send(done, plan.final, quiet) if push else None
    if json:
        where = {"output": str(plan.final), **({"pushed": sent.url} if sent else {})}
        ui.echo_json({**where, **done.as_json()})
        return
    if not quiet:
        _show(done)
    if sent and not quiet:
        print_rows(ui.pushed(sent))
    ui.echo_path(plan.final)


def _heads(text: str | None) -> tuple[int, int] | None:
    """32,8: heads of queries, heads of keys and values; one number where they are as many."""
    if text is None:
        return None
    try:
        queries, keys = map(int, text.split(",")) if "," in text else (int(text), int(text))
    except ValueError:
        queries = keys = 0
    if keys < 1 or queries < 1 or queries % keys:
        raise UsageError(
            f"--heads {text} is no number of heads.",
            "heads of queries, then of keys, as in config.json of the model: --heads 32,8",
        )
    return queries, keys


def _renaming(text: str) -> tuple[str, str]:
    """OLD=NEW, of which either may be empty."""
    old, equals, new = text.partition("=")
    if not equals:
        raise UsageError(
            f"--rename {text} does not say what takes its place.",
            f"for example: --rename '{text}=model.'",
        )
    return old, new


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
                type=Words(layout_names),
                metavar=LAYOUT,
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
                "base",
                "--base",
                type=click.Path(),
                metavar="MODEL",
                help="Its base model instead, where that says what it started from (PiSSA, OLoRA).",
            ),
            Flag(
                "pruned",
                "--pruned",
                type=click.Path(),
                multiple=True,
                metavar="DIR",
                help="Index files of the pruning its base had gone through (LoRAM); repeatable.",
            ),
            Flag(
                "shared",
                "--shared",
                type=click.Path(),
                metavar="ADAPTER",
                help="Where factors are that the adapter leaves out: frozen or shared ones.",
            ),
            Flag(
                "projections",
                "--projections",
                type=click.Choice(["split", "fused"]),
                help="q, k, v and gate, up of a language model by themselves, or as qkv_proj and "
                "gate_up_proj; experts as modules, or parameters.  [default: as they are]",
            ),
            Flag(
                "rename",
                "--rename",
                multiple=True,
                metavar="OLD=NEW",
                help="Another prefix for the names of modules, as versions of a model's code have "
                "it; repeatable.",
            ),
            Flag(
                "heads",
                "--heads",
                metavar="N,N",
                help="Heads of queries and of keys, where shapes do not tell: torchtune, qkv_proj.",
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
            *SENDING,
            FORCE,
            *SHOWN,
        ],
        help=convert.__doc__,
        short_help="Write an adapter in another layout, bit for bit.",
        example="loramerge convert my-adapter --to mlx",
    ),
}
