"""Commands that need a base model: bake an adapter into it, extract one from a tuned model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loramerge.cli.command import Command, Flag
from loramerge.cli.flags import ADAPTER, FORCE, INPUTS, OUT, SAVE_DTYPE, SENDING, SHOWN, path
from loramerge.cli.sending import TOLD, Sending, sending
from loramerge.cli.terminal import Row, print_rows
from loramerge.errors import UsageError

if TYPE_CHECKING:
    from loramerge.adapter import Adapter

__all__ = ["COMMANDS"]


def bake(adapter: str, base: str, rank: int | None, **wishes: Any) -> None:
    """Add an adapter to its base model: full weights, shard by shard, in the base's own dtypes.

    With --rank the result is an adapter instead: the best plain LoRA of that rank for what a DoRA
    makes of its base, with the error printed. DoRA, W' = m (W + dW) / ||W + dW||, is no sum of
    updates, so that it can be merged with others only after this.

    Heads and biases in the adapter replace those of the base. Quantised bases are refused: their
    weights are codes, to which no update can be added.
    """
    from loramerge.bake import bake as baked
    from loramerge.cli.inputs import named_adapters, opened
    from loramerge.cli.progress import progress
    from loramerge.cli.ui import echo_json, echo_path, in_bytes
    from loramerge.compute import own_process
    from loramerge.derive import undecomposed
    from loramerge.io._checkpoint import open_checkpoint
    from loramerge.publish import stem

    own_process()
    push = sending("bake", **{key: wishes.pop(key) for key in TOLD})
    if rank is None and push is not None:
        raise UsageError(
            "bake --push sends an adapter, and this is a model.", "leave it out, or add --rank N"
        )
    if rank is None and wishes["save_dtype"] is not None:
        raise UsageError(
            "bake keeps the dtypes of the base; --save-dtype is for an adapter.",
            "leave it out, or add --rank N",
        )
    if rank is None and Path(wishes["out"] or "").suffix == ".safetensors":
        raise UsageError("bake writes a model's directory, not one file.", "name a directory")
    (source,) = opened(named_adapters([adapter], (), wishes["alpha"], wishes["from_"]))
    model = open_checkpoint(base)
    if rank is not None:
        _squeeze(undecomposed(source, model), rank, f"{stem(source)}-r{rank}", push, wishes)
        return
    final = Path(wishes["out"] or f"{stem(source)}-baked").expanduser()
    with progress(wishes["quiet"]) as listen:
        done = baked(source, model, final, wishes["force"], listen)
    if wishes["json"]:
        echo_json(
            {
                "output": str(final),
                "modules": done.modules,
                "replaced": list(done.replaced),
                "tensors": done.tensors,
                "shards": done.shards,
                "bytes": done.nbytes,
            }
        )
        return
    if not wishes["quiet"]:
        replaced = f"; {len(done.replaced)} replaced" if done.replaced else ""
        changed = f"{done.modules} of {len(source.modules)} modules added{replaced}"
        print_rows(
            [
                Row("adapter", adapter),
                Row("base", base),
                Row("modules", changed),
                Row(
                    "written",
                    f"{in_bytes(done.nbytes)}, {done.tensors} tensors in {done.shards} files; "
                    "re-read and verified",
                ),
            ]
        )
    echo_path(final)


def extract(base: str, tuned: str, rank: int, **wishes: Any) -> None:
    """Make an adapter of what tuning changed: the best of a rank for each matrix that differs.

    Reads both models shard by shard; what changed and is no matrix (biases, norms) is left out and
    named. The error printed is against the whole difference of the matrices.
    """
    from loramerge.compute import own_process
    from loramerge.derive import difference
    from loramerge.io._checkpoint import open_checkpoint

    own_process()
    push = sending("extract", **{key: wishes.pop(key) for key in TOLD})
    found = difference(open_checkpoint(base), open_checkpoint(tuned), tuned)
    _squeeze(found, rank, f"{_stem(tuned)}-lora-r{rank}", push, wishes)


def _stem(reference: str) -> str:
    return Path(reference).expanduser().resolve().name.removesuffix(".safetensors")


def _squeeze(
    derived: "Adapter", rank: int, name: str, push: Sending | None, wishes: dict[str, Any]
) -> None:
    """Run the squeeze of a derived adapter as any other."""
    from loramerge.cli import ui
    from loramerge.cli.progress import progress
    from loramerge.plan import make_plan
    from loramerge.publish import destination, publish
    from loramerge.recipe import Named, make_recipe

    values = {"rank": rank, "save_dtype": wishes["save_dtype"] or "auto"}
    plan = make_plan(make_recipe("squeeze", [Named(derived.reference)], values), [derived])
    final = destination(plan, wishes["out"] or name, wishes["force"])
    if push is not None:
        push.check()
    shown = ui.Results(batch=False, as_json=wishes["json"], quiet=wishes["quiet"])
    with progress(wishes["quiet"]) as listen:
        report = publish(plan, final, wishes["force"], listen)
    shown.add(report, final, push.send(report, final, wishes["quiet"]) if push else None)
    shown.close()


_WRITTEN = (OUT, *SENDING, FORCE, SAVE_DTYPE, *SHOWN)
COMMANDS: dict[str, click.Command] = {
    "bake": Command(
        "bake",
        callback=bake,
        params=[
            ADAPTER,
            Flag(
                "base",
                "--base",
                type=click.Path(),
                required=True,
                metavar="MODEL",
                help="Directory of the base model, or one safetensors file.",
            ),
            Flag(
                "rank",
                "-r",
                "--rank",
                type=click.IntRange(min=1),
                metavar="N",
                help="Write a plain LoRA of this rank instead of full weights.",
            ),
            *INPUTS,
            *_WRITTEN,
        ],
        help=bake.__doc__,
        short_help="Add an adapter to its base model; make plain LoRA of DoRA.",
        example="loramerge bake my-dora --base my-model --rank 16",
    ),
    "extract": Command(
        "extract",
        callback=extract,
        params=[
            path("base"),
            path("tuned"),
            Flag(
                "rank",
                "-r",
                "--rank",
                type=click.IntRange(min=1),
                required=True,
                metavar="N",
                help="Rank of the adapter.",
            ),
            *_WRITTEN,
        ],
        help=extract.__doc__,
        short_help="Make an adapter of the difference between two full models.",
        example="loramerge extract my-model my-tuned-model --rank 32",
    ),
}
