"""The library as Python functions: same names, options and defaults as the command line.

import loramerge as lm
a, b = lm.load("a/"), lm.load("b.safetensors", alpha=32)
merged, report = lm.cluster([a, b], weights=[1, 0.5], k=16)
merged.save("out/")
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from loramerge.adapter import Adapter
from loramerge.errors import UsageError
from loramerge.events import silent
from loramerge.io._hub import fetch
from loramerge.io._open import open_adapter
from loramerge.options import did_you_mean
from loramerge.plan import make_plan
from loramerge.recipe import Named, find, make_recipe, options_of
from loramerge.result import Result, compute

if TYPE_CHECKING:
    from loramerge.comparison import Compared
    from loramerge.converted import Converted
    from loramerge.report import Report
    from loramerge.trials import Trial

__all__ = [
    "Input",
    "Result",
    "compare",
    "convert",
    "load",
    "run",
    "sweep",
]


def load(
    reference: str | Path,
    alpha: float | None = None,
    *,
    layout: str | None = None,
    allow_pickle: bool = False,
    shared: str | Path | None = None,
) -> Adapter:
    """Open a directory, a .safetensors file, or user/repo on the Hub; only headers are read.

    A file on the Hub is downloaded when its tensors are needed. `alpha` is the lora_alpha of a bare
    file that does not say it; `layout` is told from the keys unless it is given; a pickle (.bin) is
    refused unless `allow_pickle`, and then nothing of it is run; factors that it leaves out are in
    what is `shared`. Raises AdapterError with the reason for anything that is not a readable
    adapter, HubError where the Hub does not give it.
    """
    return open_adapter(
        str(reference),
        None if alpha is None else float(alpha),
        named=layout,
        allow_pickle=allow_pickle,
        shared=None if shared is None else str(shared),
    )


Input: TypeAlias = str | Path | Adapter | Result


def convert(
    adapter: Input,
    to: str,
    out: str | Path | None = None,
    *,
    extras: str = "error",
    force: bool = False,
    initial: Input | None = None,
    base: str | Path | None = None,
    pruned: Sequence[str | Path] = (),
    heads: tuple[int, int] | None = None,
    projections: Literal["split", "fused", "experts"] | None = None,
    rename: Mapping[str, str] | None = None,
    allow_pickle: bool = False,
) -> "Converted":
    """Write an adapter in another layout: factors bit for bit, names translated.

    The options are those of `loramerge convert --help`; `heads` are of queries and of keys. What
    was written is at `.path` of what is returned, `.notes` say what was folded, lost or assumed.
    Raises the errors of `loramerge.errors`, with the same messages as the command line.
    """
    from loramerge.conversion import plan_conversion
    from loramerge.converted import convert
    from loramerge.io._checkpoint import open_checkpoint
    from loramerge.needs import Needs

    needs = Needs(
        initial=None if initial is None else _opened(initial),
        base=None if base is None else open_checkpoint(str(base)),
        pruned=tuple(map(str, pruned)),
        heads=heads,
        projections=projections,
        renames=tuple((rename or {}).items()),
        allow_pickle=allow_pickle,
    )
    place = None if out is None else str(out)
    plan = plan_conversion(_opened(adapter), to, place, extras=extras, force=force, needs=needs)
    return convert(plan)


def run(
    method: str,
    adapters: Input | Iterable[Input],
    /,
    *,
    weights: Sequence[float] | None = None,
    **values: object,
) -> tuple[Result, "Report"]:
    """Run a method by name; `values` are its options and the shared settings, flat.

    Raises the errors of `loramerge.errors`, with the same messages as the command line.
    """
    named, opened = _named(method, adapters, weights, values)
    plan = make_plan(make_recipe(method, named, values), opened)
    fetch(opened, silent)
    return compute(plan)


def sweep(
    method: str,
    adapters: Input | Iterable[Input],
    tried: Sequence[float],
    /,
    *,
    weights: Sequence[float] | None = None,
    **values: object,
) -> tuple["Trial", ...]:
    """Try many values of the option a method can be swept over: cluster's k, prune's threshold.

    Each module is read once, and nothing is written. The rest is as in `run`.
    """
    from loramerge.trials import sweep, sweep_recipes

    named, opened = _named(method, adapters, weights, values)
    return sweep(sweep_recipes(method, named, values, tried), opened)


def compare(
    adapters: Input | Iterable[Input],
    methods: str | Iterable[str],
    /,
    *,
    weights: Sequence[float] | None = None,
    **values: object,
) -> tuple["Compared", ...]:
    """Try several merges of the same adapters, written as for `loramerge compare --methods`.

    `values` are settings for all of them; `ties:density=0.5` is a method with an option of its own.
    Each module is read once, and nothing is written.
    """
    from loramerge.comparison import compare_methods, entries, recipes

    rows = entries(methods)
    named, opened = _inputs(adapters, weights)
    plans = [make_plan(recipe, opened) for recipe in recipes(rows, named, values)]
    fetch(opened, silent)
    return compare_methods(rows, plans)


def _named(
    method: str,
    adapters: Input | Iterable[Input],
    weights: Sequence[float] | None,
    values: Mapping[str, object],
) -> tuple[list[Named], list[Adapter]]:
    """Every input of a method as it was named, and opened."""
    found, _ = find(method)
    given = values if weights is None else {"weights": weights, **values}
    _check_names(method, given, [o.name for o in options_of(found)], found.takes == "many")
    return _inputs(adapters, weights)


def _inputs(
    adapters: Input | Iterable[Input], weights: Sequence[float] | None
) -> tuple[list[Named], list[Adapter]]:
    """Every input as it was named, and opened."""
    if isinstance(adapters, str | Path | Adapter | Result):
        adapters = [adapters]
    opened = [_opened(one) for one in adapters]
    factors = [1.0] * len(opened) if weights is None else [float(weight) for weight in weights]
    if len(factors) != len(opened):
        raise UsageError(
            f"{len(factors)} weights for {len(opened)} adapters.",
            "give one weight for each adapter, in their order",
        )
    named = [Named(a.reference, w, a.alpha, a.named) for a, w in zip(opened, factors, strict=True)]
    return named, opened


def _check_names(method: str, given: Iterable[str], known: list[str], many: bool) -> None:
    names = [*known, "weights"] if many else known
    for name in given:
        if name not in names:
            close = did_you_mean(name, names)
            raise UsageError(
                f"{method} has no option '{name}'.",
                f"did you mean '{close}'?" if close else f"see: help(loramerge.{method})",
            )


def _opened(one: Input) -> Adapter:
    if isinstance(one, Adapter):
        return one
    return one.adapter if isinstance(one, Result) else load(one)
