"""From an exception to what a user reads: one sentence, the next thing to type, an exit code."""

import sys

import click

from loramerge.cli.terminal import coloured
from loramerge.errors import LoramergeError
from loramerge.options import did_you_mean

__all__ = ["explain"]

# What other tools call an option.
ELSEWHERE = {"--dynamic_method": "--sv-fro", "--new_rank": "--rank"}

SAVE = "--save-recipe"


def explain(error: Exception) -> int:
    """Print a failure on stderr and return the exit code."""
    if isinstance(error, LoramergeError):
        _print(error.message, error.hint)
        return error.exit_code
    if isinstance(error, click.exceptions.Abort):
        sys.stderr.write("stopped\n")
        return 130
    if isinstance(error, click.ClickException):
        return _click(error)
    if isinstance(error, BrokenPipeError):
        return 1
    if isinstance(error, OSError):
        _print(f"{error.filename or 'the system'}: {error.strerror or error}.", None)
        return 1
    if isinstance(error, MemoryError):
        _print("out of memory.", "close other programs, or merge fewer adapters at a time")
        return 1
    kind = f"{type(error).__name__}: {error}".splitlines()[0]
    _print(
        f"this is a defect of loramerge ({kind}).",
        "set LORAMERGE_DEBUG=1 for the traceback, and report it",
    )
    return 1


def _click(error: click.ClickException) -> int:
    """What click found wrong with the words typed, in the same form as everything else."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is None or not isinstance(error, click.UsageError):
        _print(error.format_message(), None)
        return error.exit_code
    path = context.command_path
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(context.get_help(), err=True)
    elif isinstance(error, click.NoSuchOption) and error.option_name == SAVE:
        _print(
            f"{context.info_name} makes no adapter, of which there could be a recipe.",
            f"for example: loramerge squeeze a --rank 8 {SAVE} recipe.yaml",
        )
    elif isinstance(error, click.NoSuchOption):
        flags = [name for param in context.command.params for name in (*param.opts, "--help")]
        named = ELSEWHERE.get(error.option_name, error.option_name)
        close = did_you_mean(named, [f for f in flags if f.startswith("-")])
        close = close or next((f for f in flags if f == error.option_name[1:]), None)
        hint = f"did you mean '{close}'?" if close else f"see: {path} --help"
        _print(f"{context.info_name} has no option '{error.option_name}'.", hint)
    else:
        example = getattr(context.command, "example", None)
        missing = isinstance(error, click.MissingParameter) and example
        _print(
            error.format_message(), f"for example: {example}" if missing else f"see: {path} --help"
        )
    return error.exit_code


def _print(message: str, hint: str | None) -> None:
    colour = coloured()
    for label, text, fg in (("error:", message, "red"), ("hint:", hint, None)):
        if text:
            head = click.style(label, fg=fg, bold=True) if colour else label
            click.echo(f"{head} {_plain(text)}", err=True, color=colour)


def _plain(text: str) -> str:
    """Text without control characters: names come from files nobody vouches for."""
    return "".join(c if c.isprintable() else "?" for c in text)
