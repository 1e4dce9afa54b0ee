"""What a user types and what comes back: in this process, or in one of its own."""

import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from unittest.mock import patch

from loramerge.cli import cli, main

ROOT = Path(__file__).parents[1]
TESTBED = ROOT / "fixtures" / "testbed" / "adapters"
SHARED = ROOT.parent / "shared" / "adapters"
# Where the `loramerge` command of this interpreter is.
BIN = Path(sys.executable).parent
# Variables of the developer's own shell that change what is printed.
FOREIGN = ("COLUMNS", "FORCE_COLOR", "NO_COLOR", "TERM")


@dataclass(frozen=True)
class Typed:
    """Exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """The lines of stderr."""
        return self.err.splitlines()


def clean(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment without what a shell may say about colours, options and width."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in FOREIGN and not key.startswith("LORAMERGE_")
    }
    return {**kept, **(env or {})}


def typed(*words: str | Path, env: Mapping[str, str] | None = None) -> Typed:
    """Run `loramerge words...` in this process, in its current directory."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    argv = ["loramerge", *map(str, words)]
    code = 0
    with (
        patch.object(sys, "argv", argv),
        patch.dict(os.environ, clean(env), clear=True),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as exit:
            code = int(exit.code or 0)
    done = Typed(code, *(stream.buffer.getvalue().decode() for stream in (out, err)))
    strange = unfit(str(words[0]), done.lines) if words else []
    assert not strange, f"{' '.join(argv)}: {done.err} names {strange}"
    return done


def unfit(name: str, lines: Sequence[str]) -> list[str]:
    """The flags in hints that the command they are for does not take.

    A hint is for the command that was typed, or for the one it names. What `run` and `reproduce`
    are told is meant for the recipe, whose keys are the same words.
    """
    context = cli.make_context("loramerge", ["--help"], resilient_parsing=True)
    found: list[str] = []
    for line in lines:
        if not line.startswith("hint: ") or name in ("run", "reproduce"):
            continue
        for part in re.split(r"\bloramerge (?=[a-z-]+)", line.removeprefix("hint: ")):
            command = cli.get_command(context, part.split()[0]) if part.split() else None
            command = command or cli.get_command(context, name)
            flags = re.findall(r"(?<!\S)--?[a-z][\w-]*", part.replace("'", " "))
            known = {flag for param in command.params for flag in param.opts} if command else ()
            found += [flag for flag in flags if flag not in (*known, "--help", "--version")]
    return found


def merged(*words: str | Path, env: Mapping[str, str] | None = None) -> Typed:
    """`loramerge arithmetic a b` with more words: the fastest merge there is."""
    return typed("arithmetic", "a", "b", *words, env=env)


def tree(directory: Path) -> list[str]:
    """Every path below a directory."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def interrupt(process: subprocess.Popen[str], sent: int = signal.SIGINT) -> str:
    """Type Ctrl-C, again where it is lost; stderr.

    Python loses an interrupt that comes while it cleans up after an import.
    """
    for _ in range(6):
        process.send_signal(sent)
        with suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=10)[1]
    process.kill()
    raise AssertionError(f"not interrupted: {process.communicate()[1]}")


def shell(line: str, cwd: Path, env: Mapping[str, str] | None = None) -> Typed:
    """Run a line exactly as a user types it, in a shell of its own."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        line,
        shell=True,
        cwd=cwd,
        env=clean({"PATH": path, **(env or {})}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Typed(done.returncode, done.stdout, done.stderr)


def bare(name: str, path: Path) -> Path:
    """One trained adapter of the testbed as a bare file, its scale in its own header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    copyfile(TESTBED / name / "adapter_model.safetensors", path)
    return path
