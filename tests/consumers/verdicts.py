"""What verify says a program makes of an adapter, and what the program is seen to make of it."""

import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np

from loramerge.consumers import CONSUMERS
from loramerge.io._open import open_adapter
from tests.consumers.deviations import deviation
from tests.consumers.forms import run

# No adapter of these tests has a larger rank.
MAX_RANK = 64
Load = Callable[[Path], np.ndarray]


def judge(
    program: str,
    path: Path,
    load: Load,
    wanted: np.ndarray,
    without: np.ndarray,
    allowed: float,
) -> None:
    """verify says what the program does, and what it says to type makes the program right."""
    verdict = CONSUMERS[program](open_adapter(str(path)), MAX_RANK)
    assert verdict.state == seen(load, path, wanted, without, allowed)
    words = shlex.split(verdict.remedy.format(path))
    # What needs the base model, or leaves out a head, makes another adapter.
    if words[:1] == ["loramerge"] and not {"--base", "--extras"} & set(words):
        assert seen(load, _mended(words[1:], path), wanted, without, allowed) == "right"


def seen(load: Load, path: Path, wanted: np.ndarray, without: np.ndarray, allowed: float) -> str:
    """The verdict of the program: its outputs are right, are not, or there are none.

    An adapter of which nothing arrives is refused, though no program says so.
    """
    try:
        found = load(path)
    except Exception:
        return "refused"
    if deviation(found, wanted, without) <= allowed:
        return "right"
    return "refused" if deviation(found, without, wanted) <= allowed else "wrong scale"


def _mended(words: list[str], path: Path) -> Path:
    """What is written where the words say, or else beside the adapter."""
    out = path.parent / "mended"
    if "-o" in words:
        place = words.index("-o")
        out = path.parent / words[place + 1]
        words = words[:place]
    run(*words, "-o", out)
    return out
