"""Adapters that are merged together: those under fixtures/testbed, and those to be trained first.

What is not shipped lies in a directory of the user's own, in sub-directories of these names, where
`quality.py --make` trains it: a set takes a GPU half a minute, two CPU cores about ten, the two
checkpoints of a run two.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import testbed
from testbed import FIXTURE

HARD, EASY = "adapters", "adapters_easy"
SHARED, GENTLE, MIXED = "adapters_shared_init", "adapters_gentle", "adapters_mixed_rank"
RUN = "run"
EARLIER = f"{RUN}_early"
SINGLES = ("sh3_rev", "sort_inter")

# How a set that is not shipped is trained. A run leaves its checkpoint on the way in EARLIER.
MADE: Mapping[str, Sequence[str]] = {
    RUN: ("--tasks", *SINGLES, "--steps", "400", "--checkpoint", "300"),
    SHARED: ("--tasks", "hard", "--init", "shared"),
    GENTLE: ("--tasks", "hard", "--lr", "3e-4"),
    MIXED: ("--tasks", "hard", "--rank", "4", "8", "16", "32"),
}


def place(name: str, made: Path) -> Path:
    """Where an adapter `set/task` lies: under fixtures/testbed, or where sets are made."""
    shipped = FIXTURE / name
    return shipped if shipped.exists() else made / name


def make(made: Path, wanted: Sequence[str] = tuple(MADE)) -> None:
    """Train those of the wanted sets that are missing."""
    for name in wanted:
        if not place(name, made).exists():
            base = ("--base", str(FIXTURE / "base"))
            testbed.main(["train", "--out", str(made), "--suite", name, *base, *MADE[name]])
