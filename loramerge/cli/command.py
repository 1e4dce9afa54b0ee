"""From declarations to click: values, flags in groups, commands whose help ends with an example."""

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from loramerge.errors import UsageError
from loramerge.options import Option, did_you_mean, read_value
from loramerge.registry import layout_names
from loramerge.settings import BOUNDS, GROUPS

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    AnyValue = click.ParamType[object]
else:
    AnyValue = click.ParamType  # older versions of click have no type parameter

__all__ = [
    "LAYOUT",
    "PICKLES",
    "Command",
    "Flag",
    "Words",
    "flag",
    "those_set",
    "variable",
]

OTHER = "Other"
# What help calls the name of a layout.
LAYOUT = "LAYOUT"
# What it calls a path or a reference.
FILES = ("ADAPTER", "MODEL", "DIR")
PREFIX = "LORAMERGE"
TYPED, FROM_ENVIRONMENT = ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT
# Where a command line keeps whether it allows pickles.
PICKLES = "loramerge.allow_pickle"
# Where the sentences begin in help, the same in every group.
COLUMN = 30


class Words(AnyValue):
    """Text, or several words with commas between them, that the shell completes."""

    name = "text"

    def __init__(self, words: Callable[[], Iterable[str]]) -> None:
        self.words = words

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list["CompletionItem"]:
        """The words that begin as what stands after the last comma."""
        from click.shell_completion import CompletionItem

        before, comma, last = incomplete.rpartition(",")
        found = (word for word in self.words() if word.startswith(last))
        return [CompletionItem(f"{before}{comma}{word}") for word in found]


class Value(Words):
    """A number or a word: converted here, judged by the declaration, completed in the shell."""

    def __init__(self, option: Option) -> None:
        self.option = option
        self.name = option.values
        known = layout_names if option.metavar == LAYOUT else tuple
        super().__init__(lambda: option.choices or option.words or known())

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list["CompletionItem"]:
        """Words, or files where the option takes them."""
        if self.option.metavar in FILES:
            return click.Path().shell_complete(ctx, param, incomplete)
        return super().shell_complete(ctx, param, incomplete)

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> object:
        """An int or float where the text is one, else the text."""
        return read_value(self.option, value) if isinstance(value, str) else value


class Flag(click.Option):
    """An option that knows under which heading help lists it; without one, its command's own."""

    def __init__(self, *names: str, group: str = "", **attributes: Any) -> None:
        super().__init__(list(names), **attributes)
        self.group = group

    def saying(self, words: str) -> "Flag":
        """The same flag where its sentence, or what it is by default, is another."""
        changed = copy(self)
        changed.help = words
        return changed


def flag(option: Option, hidden: bool = False, required: bool = False) -> Flag:
    """The flag of a declared option."""
    names = [option.name, option.flag, *([option.short] if option.short else [])]
    if option.type is bool:
        return Flag(*names, group=option.group, is_flag=True, default=None, help=option.description)
    facts = [] if option.default in (None, ()) else [f"default: {option.default}"]
    facts += [option.limits] if option.limits else []
    return Flag(
        *names,
        group=option.group,
        type=Value(option),
        multiple=option.repeated,
        default=None,
        hidden=hidden,
        required=required,
        help=option.description + (f"  [{'; '.join(facts)}]" if facts else ""),
        metavar=f"[{option.values}]" if option.choices else option.values,
    )


def variable(command: str, option: click.Option) -> str:
    """The environment variable of an option: LORAMERGE_SQUEEZE_MAX_ERROR."""
    longest = max(option.opts, key=len)
    return "_".join([PREFIX, command, longest.lstrip("-")]).replace("-", "_").upper()


class Command(click.Command):
    """A command with grouped options, environment variables, and an example that works."""

    def __init__(self, name: str, *, example: str, **attributes: Any) -> None:
        super().__init__(name, **attributes)
        self.example = example
        self.help = inspect.cleandoc(self.help or "")
        self.params = [copy(param) for param in self.params]  # flags are shared by commands
        for param in self.params:
            if isinstance(param, click.Option):
                param.envvar = variable(name, param)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; what was typed is kept for hints that repeat it."""
        ctx.meta["typed"] = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx  # the parser leaves it out; hints name the command
            raise

    def invoke(self, ctx: click.Context) -> Any:
        """Run; what the environment set is said on stderr.

        A bound on the rank that was typed beats one of the environment. Raises UsageError for a
        variable of this command that stands for none of its options.
        """
        self._check_environment()
        typed = any(ctx.get_parameter_source(bound) is TYPED for bound in BOUNDS)
        for option, text in given_by_environment(ctx):
            if typed and option.name in BOUNDS:
                ctx.params[str(option.name)] = None
            elif not ctx.params.get("quiet"):
                click.echo(f"{max(option.opts, key=len)} {text} from {option.envvar}", err=True)
        return super().invoke(ctx)

    def _check_environment(self) -> None:
        whose = f"{PREFIX}_{self.name}_".upper()
        options = (param for param in self.params if isinstance(param, click.Option))
        known = [str(option.envvar).removeprefix(whose) for option in options]
        for name in sorted(os.environ):
            if name.startswith(whose) and (word := name.removeprefix(whose)) not in known:
                close = did_you_mean(word, known)
                raise UsageError(
                    f"{name} is set, and stands for no option of {self.name}.",
                    f"did you mean {whose}{close}?" if close else f"unset {name}",
                )

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The command's own options first, then the shared groups in their order, then help."""
        own = f"Options of {self.name}"
        found: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record:
                names, text = record
                title = (param.group or own) if isinstance(param, Flag) else OTHER
                found.setdefault(title, []).append((f"{names:<{COLUMN}}", text))
        for title in sorted(found, key=(own, *GROUPS, OTHER).index):
            with formatter.section(title):
                formatter.write_dl(found[title], col_max=COLUMN)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One line to type."""
        with formatter.section("Example"):
            formatter.write(f"  {self.example}\n")


def those_set(values: Mapping[str, Any]) -> dict[str, object]:
    """The options that were set, of those a command was called with."""
    return {key: value for key, value in values.items() if value is not None and value != ()}


def given_by_environment(ctx: click.Context) -> list[tuple[click.Option, str]]:
    """The options whose value came from an environment variable, with that value."""
    return [
        (param, os.environ[str(param.envvar)])
        for param in ctx.command.params
        if isinstance(param, click.Option)
        and param.name
        and ctx.get_parameter_source(param.name) is FROM_ENVIRONMENT
    ]
