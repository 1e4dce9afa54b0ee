"""What the terminal at the other end can do: its width, its colours, labelled rows."""

import os
import sys
import textwrap
from collections.abc import Sequence
from typing import TextIO

import click
from msgspec import Struct

__all__ = ["Row", "bars", "coloured", "print_rows", "print_table", "width"]

NARROWEST = 40
# Bars from empty to full.
BLOCKS, GREYS = " ▁▂▃▄▅▆▇█", " .:-=+*#@"


def width(err: bool = True) -> int | None:
    """Columns to wrap at; None where nothing says, as in a pipe. COLUMNS goes first."""
    stated = os.environ.get("COLUMNS", "")
    if stated.isdigit() and int(stated) > 0:
        return max(int(stated), NARROWEST)
    try:
        columns = os.get_terminal_size(_stream(err).fileno()).columns
    except (OSError, ValueError):
        return None
    return max(columns, NARROWEST) if columns else None


def coloured(err: bool = True) -> bool:
    """Whether a stream takes colour: NO_COLOR, then FORCE_COLOR, then whether it is a terminal.

    Both variables count when they are set and not empty (no-color.org).
    """
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return _stream(err).isatty() and os.environ.get("TERM") != "dumb"


def _stream(err: bool) -> TextIO:
    return sys.stderr if err else sys.stdout


class Row(Struct, frozen=True):
    """A label and what it says; `fg` colours both."""

    label: str
    text: str
    fg: str | None = None


def print_rows(rows: Sequence[Row], err: bool = True) -> None:
    """Labels right-aligned, texts beside them, long ones wrapped to the terminal."""
    indent = max(len(row.label) for row in rows) + 2
    columns, colour = width(err), coloured(err)
    for row in rows:
        lines = _wrapped(row.text, columns - indent) if columns else [row.text]
        for number, line in enumerate(lines):
            label = f"{row.label if number == 0 else '':>{indent - 2}}"
            click.echo(_line(label, line, row.fg, colour), err=err, color=colour)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 0) -> None:
    """Columns on stdout under their names, which are bold where there is colour.

    They are right-aligned, but for the first `words`.
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    colour = coloured(err=False)
    for number, row in enumerate([head, *rows]):
        cells = [
            f"{cell:{'<' if place < words else '>'}{width}}"
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        line = "  ".join(cells)
        click.echo(click.style(line, bold=True) if colour and number == 0 else line, color=colour)


def bars(values: Sequence[float]) -> str:
    """Numbers >= 0 as a row of bars, the largest of full height; ASCII where stdout has no more."""
    marks = BLOCKS if _encodes(BLOCKS) else GREYS
    highest = max(values, default=0.0) or 1.0
    return "".join(marks[round((len(marks) - 1) * value / highest)] for value in values)


def _encodes(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def _line(label: str, text: str, fg: str | None, colour: bool) -> str:
    if not colour:
        return f"{label}  {text}".rstrip()
    return f"{click.style(label, fg=fg, bold=True)}  {click.style(text, fg=fg) if fg else text}"


def _wrapped(text: str, columns: int) -> list[str]:
    """Lines no longer than asked, except for words that are: module names and paths stay whole."""
    wide = max(columns, 20)
    return textwrap.wrap(text, wide, break_long_words=False, break_on_hyphens=False) or [""]
