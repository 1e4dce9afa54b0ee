"""Commands that need a base model: bake an adapter into it, extract one from a tuned model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loramerge.cli.command import Command, flag, those_set
from loramerge.cli.flags import ADAPTER, FORCE, INPUTS, OUT, SAVE_RECIPE, SENDING, SHOWN, path
from loramerge.cli.saving import save_recipe
from loramerge.cli.sending import TOLD, Sending, sending
from loramerge.cli.terminal import Row, print_rows
from loramerge.derivation import BakeOptions, ExtractOptions, make_baked, make_extracted
from loramerge.errors import UsageError
from loramerge.options import describe

if TYPE_CHECKING:
    from loramerge.recipe import Named

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
    if rank is None and wishes["compute_dtype"] is not None:
        raise UsageError(
            "bake adds in float32; --compute-dtype is for finding an adapter.",
            "leave it out, or add --rank N",
        )
    if rank is None and Path(wishes["out"] or "").suffix == ".safetensors":
        raise UsageError("bake writes a model's directory, not one file.", "name a directory")
    named = named_adapters([adapter], (), wishes["alpha"], wishes["from_"])
    if rank is not None or wishes["save_recipe"] is not None:
        said = {"base": base, **those_set({"rank": rank, **_dtypes(wishes)})}
        _derive("bake", named, said, push, wishes)
        return
    (source,) = opened(named)
    model = open_checkpoint(base)
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


def extract(base: str, tuned: str, **wishes: Any) -> None:
    """Make an adapter of what tuning changed: the best of a rank for each matrix that differs.

    Reads both models shard by shard; what changed and is no matrix (biases, norms) is left out and
    named. The error printed is against the whole difference of the matrices.
    """
    from loramerge.compute import own_process

    own_process()
    push = sending("extract", **{key: wishes.pop(key) for key in TOLD})
    said = those_set({"rank": wishes["rank"], **_dtypes(wishes)})
    _derive("extract", [], {"base": base, "tuned": tuned, **said}, push, wishes)


def _dtypes(wishes: dict[str, Any]) -> dict[str, object]:
    """The dtypes of computing and storing an adapter."""
    return {name: wishes[name] for name in ("save_dtype", "compute_dtype")}


def _derive(
    name: str,
    named: list["Named"],
    values: dict[str, object],
    push: Sending | None,
    wishes: dict[str, Any],
) -> None:
    """Run the squeeze of what follows from models as any other."""
    from loramerge.chain import plan_derivation
    from loramerge.cli import ui
    from loramerge.cli.inputs import opened
    from loramerge.cli.progress import progress
    from loramerge.document import recipe_document
    from loramerge.publish import destination, publish

    asked = make_baked(named, values) if named else make_extracted(named, values)
    plan = plan_derivation(asked, opened(named) if named else [])
    final = destination(plan, wishes["out"], wishes["force"])
    document = recipe_document(name, named, values, wishes["out"])
    if push is not None:
        push.check()
    save_recipe(wishes["save_recipe"], [document], [final], wishes["force"])
    shown = ui.Results(batch=False, as_json=wishes["json"], quiet=wishes["quiet"])
    with progress(wishes["quiet"]) as listen:
        report = publish(plan, final, wishes["force"], listen)
    shown.add(report, final, push.send(report, final, wishes["quiet"]) if push else None)
    shown.close()


_WRITTEN = (OUT, *SENDING, SAVE_RECIPE, FORCE, *SHOWN)
COMMANDS: dict[str, click.Command] = {
    "bake": Command(
        "bake",
        callback=bake,
        params=[
            ADAPTER,
            *(flag(one, required=one.name == "base") for one in describe(BakeOptions)),
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
            *(
                flag(one, required=one.name == "rank")
                for one in describe(ExtractOptions)
                if one.name not in ("base", "tuned")
            ),
            *_WRITTEN,
        ],
        help=extract.__doc__,
        short_help="Make an adapter of the difference between two full models.",
        example="loramerge extract my-model my-tuned-model --rank 32",
    ),
}
