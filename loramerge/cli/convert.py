"""The convert command: the same adapter in another layout."""

from typing import Any

import click
from msgspec.structs import replace

from loramerge.cli.command import PICKLES, Command, flag, those_set
from loramerge.cli.flags import ADAPTER, DRY_RUN, FORCE, INPUTS, OUT, SAVE_RECIPE, SENDING, SHOWN
from loramerge.cli.saving import save_recipe
from loramerge.cli.sending import TOLD, sending
from loramerge.errors import UsageError
from loramerge.options import describe
from loramerge.translation import CONVERT, ConvertOptions, make_translation

__all__ = ["COMMANDS"]


def convert(
    adapter: str,
    alpha: tuple[float, ...],
    from_: tuple[str, ...],
    out: str | None,
    force: bool,
    dry_run: bool,
    json: bool,
    quiet: bool,
    **given: Any,
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
    from loramerge.cli.planned import show_plans
    from loramerge.cli.progress import progress
    from loramerge.compute import own_process
    from loramerge.conversion import plan_translation
    from loramerge.converted import convert as converted
    from loramerge.document import recipe_document
    from loramerge.io._hub import fetch

    own_process()
    push = sending(CONVERT, **{key: given.pop(key) for key in TOLD})
    saved = given.pop("save_recipe")
    values = those_set(given)
    both = [adapter, *([str(given["initial"])] if given["initial"] else [])]
    named = named_adapters(both, (), alpha, from_)
    asked = make_translation(named[:1], values)
    facts = zip(named, asked.adapters, strict=True)
    asked = replace(asked, adapters=tuple(replace(one, shared=a.shared) for one, a in facts))
    sources = opened(asked.adapters, look=dry_run)
    allowed = click.get_current_context().meta[PICKLES]
    plan = plan_translation(asked, sources, out, force=force, allow_pickle=allowed)
    if saved is not None and asked != make_translation(named[:1], values):
        raise UsageError(
            "convert --save-recipe reads what --initial names as it reads the adapter.",
            "give one --alpha and one --from for both, or leave out --save-recipe",
        )
    if push is not None and not dry_run:
        push.check()
    document = recipe_document(CONVERT, named[:1], values, out)
    save_recipe(saved, [document], [plan.final], force)
    if dry_run:
        show_plans([(plan, plan.final)], as_json=json, quiet=quiet)
        return
    with progress(quiet) as listen:
        fetch(sources, listen)
        done = converted(plan, listen)
    shown = ui.Results(batch=False, as_json=json, quiet=quiet)
    shown.add(done, plan.final, push.send(done, plan.final, quiet) if push else None)
    shown.close()


COMMANDS: dict[str, click.Command] = {
    "convert": Command(
        "convert",
        callback=convert,
        params=[
            ADAPTER,
            *(flag(one, required=one.name == "to") for one in describe(ConvertOptions)),
            *INPUTS,
            OUT,
            *SENDING,
            SAVE_RECIPE,
            FORCE,
            DRY_RUN,
            *SHOWN,
        ],
        help=convert.__doc__,
        short_help="Write an adapter in another layout, bit for bit.",
        example="loramerge convert my-adapter --to mlx",
    ),
}
