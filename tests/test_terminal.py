"""What a terminal sees and a pipe does not: colours, wrapping, and a bar for long work."""

import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from loramerge.cli import progress as bars
from loramerge.cli.terminal import Row, coloured, print_rows, width
from loramerge.events import Advanced, Started
from tests.build import write_peft
from tests.conftest import factors
from tests.typed import BIN, clean, shell

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_a_terminal(
    words: list[str], cwd: Path, columns: int, until: str = "", **env: str
) -> tuple[str, str]:
    """Run with stderr on a terminal of so many columns; stdout and what the terminal got.

    Where it gets the words `until`, it types Ctrl-C, and again where nothing comes of it: Python
    loses an interrupt that meets it in the middle of an import.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [BIN / "loramerge", *words],
        cwd=cwd,
        env=clean({"TERM": "xterm", **env}),
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
    )
    os.close(theirs)
    seen, again, last = b"", 0.0, time.monotonic() + 60
    poll = select.poll()  # select() takes no descriptor from 1024 on
    poll.register(ours)
    while time.monotonic() < last and poll.poll(60_000):
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux says so when the last writer is gone
            break
        if not part:
            break
        seen += part
        if until and until.encode() in seen and time.monotonic() > again:
            process.send_signal(signal.SIGINT)
            again = time.monotonic() + 5
    if time.monotonic() >= last:
        process.kill()
    out, _ = process.communicate(timeout=60)
    os.close(ours)
    return out, seen.decode().replace("\r\n", "\n")


@pytest.fixture
def bare_file(tmp_path: Path, rng: object) -> Path:
    """A directory with x.safetensors, which does not say its alpha."""
    write_peft(tmp_path / "x.safetensors", factors(rng, 4))
    return tmp_path


def test_a_terminal_gets_colour_and_lines_no_longer_than_itself(bare_file: Path) -> None:
    out, seen = on_a_terminal(["squeeze", "x.safetensors", "-r", "2"], bare_file, 60)
    assert out == "x-r2\n"
    lines = ESCAPE.sub("", seen).splitlines()
    assert max(map(len, lines)) <= 60
    assert any(line.startswith(" " * 17) for line in lines), "nothing was wrapped"
    yellow = [line for line in seen.splitlines() if "\x1b[33m" in line]
    assert "assumed" in yellow[0]
    assert ESCAPE.sub("", seen).rstrip().endswith("sets it)")


def test_no_color_is_honoured_on_a_terminal(bare_file: Path) -> None:
    words = ["squeeze", "x.safetensors", "-r", "2"]
    _, seen = on_a_terminal(words, bare_file, 80, NO_COLOR="1")
    assert "\x1b" not in seen
    assert "retained energy" in seen


def test_a_short_job_shows_no_bar_on_a_terminal(bare_file: Path) -> None:
    _, seen = on_a_terminal(["squeeze", "x.safetensors", "-r", "2"], bare_file, 80)
    assert "\x1b[?25l" not in seen  # the cursor is never hidden
    assert "writing" not in seen


def test_a_pipe_gets_plain_lines_that_are_not_wrapped(bare_file: Path) -> None:
    done = shell("loramerge squeeze x.safetensors -r 2", bare_file)
    assert "\x1b" not in done.err
    assert max(map(len, done.lines)) > 80


class Stream(io.StringIO):
    """A stderr that is a terminal, or not."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize(
    ("terminal", "env", "expected"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (False, {"FORCE_COLOR": "1"}, True),
        (True, {"NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_colour_follows_the_terminal_and_the_two_variables(
    terminal: bool, env: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", Stream(terminal))
    assert coloured() is expected


@pytest.mark.parametrize(("columns", "expected"), [("72", 72), ("5", 40), ("x", None), ("", None)])
def test_columns_says_the_width_where_no_terminal_does(
    columns: str, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys, "stderr", Stream(False))
    assert width() == expected


def test_long_rows_are_wrapped_under_their_text_and_names_stay_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    name = "base_model.model." + "layers.0." * 5 + "q_proj"
    print_rows([Row("label", f"one two three four five six seven {name}"), Row("x", "y")])
    assert capsys.readouterr().err.splitlines() == [
        "label  one two three four five six seven",
        f"       {name}",
        "    x  y",
    ]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until a test turns it."""
    now = [0.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    return now


def heard(clock: list[float], seconds: float, quiet: bool = False) -> None:
    with bars.progress(quiet) as listen:
        listen(Started("computing", 4))
        listen(Advanced(1))
        clock[0] += seconds
        listen(Advanced(1))
        listen(Started("writing", 4))
        listen(Advanced(4))


@pytest.mark.parametrize(
    ("terminal", "seconds", "quiet", "drawn"),
    [
        (True, 1.1, False, True),
        (True, 0.9, False, False),
        (False, 60, False, False),
        (True, 60, True, False),
    ],
)
def test_a_bar_is_drawn_after_a_second_on_a_terminal_only(
    terminal: bool,
    seconds: float,
    quiet: bool,
    drawn: bool,
    clock: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = Stream(terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    heard(clock, seconds, quiet)
    assert ("computing" in stream.getvalue()) is drawn
    assert bool(stream.getvalue()) is drawn
