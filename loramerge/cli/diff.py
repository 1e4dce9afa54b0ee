"""The diff command: how two adapters differ, and a gate for scripts."""

from typing import TYPE_CHECKING, Any

from loramerge.cli.command import Command, Flag
from loramerge.cli.flags import INPUTS, SHOWN, path
from loramerge.cli.terminal import Row, print_rows
from loramerge.errors import GateError, UsageError, listed

if TYPE_CHECKING:
    from loramerge.difference import ModuleDifference

__all__ = ["DIFF"]

# Modules that are shown one by one, the most different first.
MOST = 5


def diff(
    a: str,
    b: str,
    fail_above: float | None,
    alpha: tuple[float, ...],
    from_: tuple[str, ...],
    json: bool,
    quiet: bool,
) -> None:
    """Compare two adapters module by module: relative Frobenius norm of A - B, cosine, norm ratio.

    Numbers are of delta weights, computed from the factors in float64, so that rank, scale, layout
    and factorisation make no difference. A module that one adapter lacks counts as zero there.
    --fail-above makes it a gate: exit code 3 if any module differs by more.
    """
    from loramerge.cli.inputs import named_adapters, opened
    from loramerge.cli.progress import progress
    from loramerge.cli.ui import echo_json
    from loramerge.difference import difference
    from loramerge.io._hub import fetch

    if fail_above is not None and not fail_above >= 0:
        raise UsageError(f"diff: --fail-above is {fail_above:g}; it must be >= 0.")
    adapters = opened(named_adapters([a, b], (), alpha, from_))
    with progress(quiet or json) as listen:
        fetch(adapters, listen)
    found = difference(*adapters)
    ranked = sorted(found.modules, key=lambda module: (-module.relative, module.name))
    if json:
        only = {"only_in_a": list(found.only_a), "only_in_b": list(found.only_b)}
        echo_json({"whole": _facts(found.whole), "modules": [_facts(m) for m in ranked], **only})
    else:
        rows = [Row("whole adapter", _text(found.whole))]
        rows += [Row(module.name, _text(module)) for module in ranked[:MOST]]
        for name, missing in ((a, found.only_a), (b, found.only_b)):
            if missing:
                rows.append(Row(f"only in {name}", listed(list(missing))))
        print_rows(rows, err=False)
    if fail_above is not None and ranked[0].relative > fail_above:
        raise GateError(
            f"{ranked[0].name} differs by {ranked[0].relative:.3g}, above {fail_above:g}.",
            "allow more with --fail-above, or see --json for every module",
        )


def _facts(module: "ModuleDifference") -> dict[str, Any]:
    relative = module.relative if module.relative != float("inf") else None
    return {
        "name": module.name,
        "relative": relative,
        "cosine": module.cosine,
        "norm_ratio": module.norm_ratio,
    }


def _text(module: "ModuleDifference") -> str:
    shown = {"relative": module.relative, "cosine": module.cosine, "norm ratio": module.norm_ratio}
    return "  ".join(f"{k} {'none' if v is None else format(v, '.3g')}" for k, v in shown.items())


DIFF = Command(
    "diff",
    callback=diff,
    params=[
        path("a"),
        path("b"),
        Flag(
            "fail_above",
            "--fail-above",
            type=float,
            metavar="X",
            help="Exit with code 3 if a module's relative difference is larger.",
        ),
        *INPUTS,
        *SHOWN,
    ],
    help=diff.__doc__,
    short_help="Compare two adapters module by module; a gate for scripts.",
    example="loramerge diff a b",
)
