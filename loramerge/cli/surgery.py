"""The split command: one adapter as several whose sum it is."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loramerge.cli.command import Command, Flag, those_set
from loramerge.cli.flags import (
    ADAPTER,
    COMPUTE_DTYPE,
    FORCE,
    INPUTS,
    OUT_DIR,
    SAVE_DTYPE,
    SAVE_RECIPE,
    SHOWN,
)
from loramerge.cli.saving import save_recipe
from loramerge.errors import UsageError
from loramerge.patterns import check_match, matches
from loramerge.recipe import make_recipe

if TYPE_CHECKING:
    from loramerge.adapter import Adapter

__all__ = ["COMMANDS"]

PIECES = "pieces"
EXAMPLE = f"loramerge split my-adapter --every 4 --out-dir {PIECES}"


def split(
    adapter: str, every: int | None, modules: tuple[str, ...], out_dir: str | None, **wishes: Any
) -> None:
    """Split an adapter into several adapters whose sum it is.

    With --every N by rank: the first piece has the N largest terms of each module's singular value
    decomposition, the next piece the N that follow. --every 1 gives rank-1 experts for a router.
    With --modules by name: a piece for each glob, of the modules that no glob before it took, and
    one of the rest. Pieces by name hold what the adapter holds; of pieces by rank the sum is the
    adapter but for the rounding to the stored dtype.

    Each piece is what `loramerge select` makes of the adapter, and is measured against it.
    """
    from loramerge.cli import ui
    from loramerge.cli.inputs import named_adapters, opened
    from loramerge.cli.progress import progress
    from loramerge.compute import own_process
    from loramerge.document import recipe_document
    from loramerge.plan import make_plan
    from loramerge.publish import destination, publish

    if (every is None) == (not modules):
        raise UsageError("split takes one of --every and --modules.", f"for example: {EXAMPLE}")
    own_process()
    inputs = named_adapters([adapter], (), wishes["alpha"], wishes["from_"])
    (source,) = opened(inputs)
    jobs, steps = [], []
    for name, taken in _pieces(source, every, modules).items():
        dtypes = {key: wishes[key] for key in ("save_dtype", "compute_dtype")}
        values = those_set({**taken, **dtypes})
        out = str(Path(out_dir or PIECES, name))
        plan = make_plan(make_recipe("select", inputs, values), [source])
        jobs.append((plan, destination(plan, out, wishes["force"])))
        steps.append(recipe_document("select", inputs, values, out))
    save_recipe(wishes["save_recipe"], steps, [final for _, final in jobs], wishes["force"])
    shown = ui.Results(batch=True, as_json=wishes["json"], quiet=wishes["quiet"])
    for plan, final in jobs:
        with progress(wishes["quiet"]) as listen:
            report = publish(plan, final, wishes["force"], listen)
        shown.add(report, final)
    shown.close()


def _pieces(
    source: "Adapter", every: int | None, modules: tuple[str, ...]
) -> dict[str, dict[str, object]]:
    """What `select` is to take for each piece, by the piece's name.

    Raises UsageError for a glob that takes no module.
    """
    if every is not None:
        last = source.max_rank - 1
        groups = [(first, min(first + every - 1, last)) for first in range(0, last + 1, every)]
        return {f"ranks-{a}-{b}": {"ranks": f"{a}-{b}"} for a, b in groups}
    left = list(source.modules)
    for glob in modules:
        check_match(glob, list(source.modules), f"--modules '{glob}' matches no module")
        if not any(matches(name, glob) for name in left):
            raise UsageError(
                f"--modules '{glob}' takes only modules that a glob before it took.",
                "leave it out, or name it first",
            )
        left = [name for name in left if not matches(name, glob)]
    found: dict[str, dict[str, object]] = {
        f"modules-{place + 1}": {"include": (glob,), "exclude": modules[:place]}
        for place, glob in enumerate(modules)
    }
    if left:
        found["rest"] = {"exclude": modules}
    return found


COMMANDS: dict[str, click.Command] = {
    "split": Command(
        "split",
        callback=split,
        params=[
            ADAPTER,
            Flag(
                "every",
                "--every",
                type=click.IntRange(min=1),
                metavar="N",
                help="Split by rank, so many terms to a piece.",
            ),
            Flag(
                "modules",
                "--modules",
                multiple=True,
                metavar="GLOB",
                help="Split by module names, a piece for each glob; repeatable.",
            ),
            *INPUTS,
            OUT_DIR.saying(f"Directory for the pieces.  [default: {PIECES}]"),
            SAVE_RECIPE,
            FORCE,
            SAVE_DTYPE,
            COMPUTE_DTYPE,
            *SHOWN,
        ],
        help=split.__doc__,
        short_help="Split an adapter into several whose sum it is, by rank or by module.",
        example=EXAMPLE,
    )
}
