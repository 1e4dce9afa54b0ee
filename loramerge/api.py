"""The library as Python functions: same names, options and defaults as the command line.

import loramerge as lm
a, b = lm.load("a/"), lm.load("b.safetensors", alpha=32)
merged, report = lm.cluster([a, b], weights=[1, 0.5], k=16)
merged.save("out/")
"""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from loramerge import errors
from loramerge.adapter import Adapter
from loramerge.errors import UsageError
from loramerge.io._open import open_adapter as load
from loramerge.io._write import staged
from loramerge.plan import make_plan
from loramerge.publish import WEIGHTS, compute_into
from loramerge.recipe import Named, make_recipe
from loramerge.registry import methods

if TYPE_CHECKING:
    from loramerge.report import Report

__all__ = ["Result", "load", "names", "public", "run"]


class Result:
    """A computed adapter, held in a temporary directory until it is saved or let go."""

    def __init__(self, files: Path, adapter: Adapter) -> None:
        self._files = files
        self.adapter = adapter
        weakref.finalize(self, shutil.rmtree, files, ignore_errors=True)

    def save(self, path: str | Path, force: bool = False) -> Path:
        """Write to a directory, or to one file where the path ends in .safetensors.

        Raises OutputError where something stands there and `force` is not set.
        """
        final = Path(path)
        with staged(final, force) as directory:
            if final.suffix == ".safetensors":
                shutil.copyfile(self.adapter.source.path, directory / final.name)
            else:
                for file in self._files.iterdir():
                    shutil.copyfile(file, directory / file.name)
        return final


Input: TypeAlias = str | Path | Adapter | Result


def run(
    method: str,
    adapters: Sequence[Input] | Input,
    *,
    weights: Sequence[float] | None = None,
    **values: object,
) -> tuple[Result, "Report"]:
    """Run a method by name; `values` are its options and the shared settings, flat.

    Raises the errors of `loramerge.errors`, with the same messages as the command line.
    """
    given = list(adapters) if isinstance(adapters, list | tuple) else [adapters]
    opened = [_opened(one) for one in given]
    factors = list(weights) if weights is not None else [1.0] * len(opened)
    if len(factors) != len(opened):
        raise UsageError(f"{len(factors)} weights for {len(opened)} adapters.")
    named = [Named(a.reference, float(w)) for a, w in zip(opened, factors, strict=True)]
    plan = make_plan(make_recipe(method, named, values), opened)
    files = Path(tempfile.mkdtemp(prefix="loramerge-"))
    try:
        name = WEIGHTS if not plan.layout.directory else "result"
        report = compute_into(plan, files, name, lambda event: None)
        return Result(files, load(str(files / WEIGHTS))), report
    except BaseException:
        shutil.rmtree(files)
        raise


def _opened(one: Any) -> Adapter:
    if isinstance(one, Adapter):
        return one
    return one.adapter if isinstance(one, Result) else load(str(one))


def names() -> list[str]:
    """Every public name: fixed ones, methods, presets."""
    presets = [preset.name for method in methods().values() for preset in method.presets]
    return sorted(["Result", "errors", "load", "run", *methods(), *presets])


def public(name: str) -> Any:
    """The object of a public name. Raises AttributeError for any other."""
    fixed: dict[str, Any] = {"Result": Result, "errors": errors, "load": load, "run": run}
    if name in fixed:
        return fixed[name]
    if name.startswith("_") or name not in names():
        raise AttributeError(f"module 'loramerge' has no attribute '{name}'")
    return _function(name)


def _function(name: str) -> Callable[..., tuple[Result, "Report"]]:
    def call(
        adapters: Sequence[Input] | Input,
        *,
        weights: Sequence[float] | None = None,
        **values: object,
    ) -> tuple[Result, "Report"]:
        return run(name, adapters, weights=weights, **values)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"`loramerge {name}` as a function; its options are keyword arguments."
    return call
