"""From an exception to what a user reads: one sentence, the next thing to type, an exit code."""

import sys

import click

from loramerge.errors import LoramergeError

__all__ = ["explain"]


def explain(error: Exception) -> int:
    """Print a failure on stderr and return the exit code."""
    if isinstance(error, LoramergeError):
        _print(error.message, error.hint)
        return error.exit_code
    if isinstance(error, click.exceptions.Abort):
        sys.stderr.write("stopped\n")
        return 130
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx else "loramerge"
        _print(error.format_message(), f"see: {path} --help")
        return 2
    if isinstance(error, click.ClickException):
        _print(error.format_message(), None)
        return error.exit_code
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


def _print(message: str, hint: str | None) -> None:
    text = f"error: {message}\n" + (f"hint: {hint}\n" if hint else "")
    sys.stderr.write("".join(c if c.isprintable() or c == "\n" else "?" for c in text))
