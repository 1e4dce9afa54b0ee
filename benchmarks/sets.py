"""Adapters that are merged together: those under fixtures/testbed, and those to be trained first.

What is not shipped lies in a directory of the user's own, in sub-directories of these names, where
`quality.py --make` trains it: a set takes a GPU half a minute, two CPU cores about ten.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import testbed
from testbed import FIXTURE

HARD, EASY = "adapters", "adapters_easy"
SHARED, GENTLE, MIXED = "adapters_shared_init", "adapters_gentle", "adapters_mixed_rank"
WHOLE, EARLIER = "run_whole", "run_earlier"
SINGLES = ("sh3_rev", "sort_inter")

# How a set that is not shipped is trained. The two of a run begin and go on alike, but that one
# stops after 600 steps.
MADE: Mapping[str, Sequence[str]] = {
    SHARED: ("--tasks", "hard", "--init", "shared"),
    GENTLE: ("--tasks", "hard", "--lr", "3e-4"),
    MIXED: ("--tasks", "hard", "--rank", "4", "8", "16", "32"),
    WHOLE: ("--tasks", *SINGLES),
    EARLIER: ("--tasks", *SINGLES, "--steps", "600"),
}


def place(name: str, made: Path) -> Path:
    """Where an adapter `set/task` lies: under fixtures/testbed, or where sets are made."""
    shipped = FIXTURE / name
    return shipped if shipped.exists() else made / name


def make(made: Path) -> None:
    """Train the sets that are missing."""
    for name, words in MADE.items():
        if not place(name, made).exists():
            base = ("--base", str(FIXTURE / "base"))
            testbed.main(["train", "--out", str(made), "--suite", name, *base, *words])
