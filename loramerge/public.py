"""The public names of the package: fixed ones, and a function for every method and preset."""

import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loramerge import errors
from loramerge.api import Input, Result, compare, convert, load, run, sweep
from loramerge.exchange import pull, push
from loramerge.options import Option
from loramerge.recipe import find, fixed, options_of
from loramerge.registry import Method, methods

if TYPE_CHECKING:
    from loramerge.report import Report

__all__ = ["names", "public"]

# Public names that are neither methods nor presets.
FIXED: Mapping[str, object] = {
    "Result": Result,
    "errors": errors,
    "load": load,
    "compare": compare,
    "convert": convert,
    "pull": pull,
    "push": push,
    "run": run,
    "sweep": sweep,
}


def names() -> list[str]:
    """Every public name: fixed ones, methods, presets."""
    presets = [preset.name for method in methods().values() for preset in method.presets]
    return sorted(["__version__", *FIXED, *methods(), *presets])


def public(name: str) -> Any:
    """The object of a public name. Raises AttributeError for any other."""
    if name in FIXED:
        return FIXED[name]
    if name.startswith("_") or name not in names():
        raise AttributeError(f"module 'loramerge' has no attribute '{name}'")
    return _function(name)


def _function(name: str) -> Callable[..., tuple[Result, "Report"]]:
    """The function of a method or preset, with its options as keyword arguments."""
    found, preset = find(name)
    options = [option for option in options_of(found) if option.name not in fixed(preset)]

    def call(adapters: Input | Iterable[Input], /, **values: Any) -> tuple[Result, "Report"]:
        return run(name, adapters, **values)

    call.__name__ = call.__qualname__ = name
    call.__module__ = "loramerge"
    call.__doc__ = "\n".join(
        [
            inspect.cleandoc(preset.summary if preset else found.documentation),
            "",
            found.paper,
            "",
            "Options, as keyword arguments:",
            *(_line(option) for option in options),
            "",
            "Returns the result, to be saved or merged further, and the report.",
        ]
    )
    call.__signature__ = _signature(options, found)  # type: ignore[attr-defined]  # read by inspect
    return call


def _signature(options: Sequence[Option], method: Method) -> inspect.Signature:
    """Every option with a default that can be passed: the name of another option cannot."""
    many = method.takes == "many"
    kind = inspect.Parameter.KEYWORD_ONLY
    first = inspect.Parameter("adapters" if many else "adapter", inspect.Parameter.POSITIONAL_ONLY)
    weights = [inspect.Parameter("weights", kind, default=None)] if many else []
    rest = [
        inspect.Parameter(
            option.name,
            kind,
            default=None if option.default == method.rank_option else option.default,
        )
        for option in options
    ]
    return inspect.Signature([first, *weights, *rest])


def _line(option: Option) -> str:
    limits = f", {option.limits}" if option.limits else ""
    text = f"{option.name} ({option.values}{limits}; default {option.default!r})"
    return textwrap.fill(
        f"{text}: {option.description}",
        92,
        initial_indent="  ",
        subsequent_indent="      ",
        break_on_hyphens=False,
    )
