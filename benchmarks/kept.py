"""Exact match that was counted before: a table that was broken off goes on where it was.

What is kept is one number for what was asked: these weights added to this base, on these sequences,
counted by this code. A merge that comes out otherwise, by one bit, is asked anew.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import exactmatch
import programs
import torch
import trainer
import transformers
from testbed import FIXTURE
from torch import Tensor

from loramerge.adapter import Adapter


class Kept:
    """Numbers by question, in a file that grows line by line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found = dict(_lines(path)) if path.exists() else {}
        self.counting = _digest(
            *(
                Path(str(module.__file__)).read_bytes()
                for module in (exactmatch, programs, trainer)
            ),
            *(version.encode() for version in (torch.__version__, transformers.__version__)),
            *(file.read_bytes() for file in sorted((FIXTURE / "base").iterdir())),
        )

    def question(self, weights: str, sequences: Tensor) -> str:
        """What stands for weights, by their own digest, asked for these sequences [n, 20]."""
        return _digest(self.counting.encode(), weights.encode(), sequences.numpy().tobytes())

    def add(self, question: str, exact: float) -> None:
        """Keep a number, on disk as well."""
        self.found[question] = exact
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(f"{question} {exact!r}\n")


def weights(adapter: Adapter | None) -> str:
    """A digest of what an adapter adds to a base."""
    parts = []
    for name in sorted(adapter.modules) if adapter else ():
        update = adapter.read(name)
        parts += [name.encode(), update.A.tobytes(), update.B.tobytes()]
    return _digest(*parts)


def _lines(path: Path) -> Iterator[tuple[str, float]]:
    """Whole lines: one that was cut off, with what was glued to it, is left out."""
    for line in path.read_text().split("\n")[:-1]:
        if len(words := line.split(" ")) == 2:
            yield words[0], float(words[1])


def _digest(*parts: bytes) -> str:
    """One digest of several parts, each with its length before it."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
