"""How far a program's outputs are from what they must be, and the table of it at the end."""

from dataclasses import dataclass

import numpy as np

HEAD = ("program", "versions", "what was loaded", "deviation", "allowed")


@dataclass(frozen=True, slots=True)
class Measured:
    """One forward pass: the largest difference of any output, in units of the adapter's effect."""

    program: str
    versions: str
    what: str
    deviation: float
    allowed: float


LEDGER: list[Measured] = []


def deviation(found: np.ndarray, wanted: np.ndarray, without: np.ndarray) -> float:
    """The largest difference from `wanted`, in units of the largest change the adapter makes."""
    effect = np.abs(wanted - without).max()
    return float(np.abs(found.astype(np.float64) - wanted).max() / effect)


def compare(
    program: str,
    versions: str,
    what: str,
    found: np.ndarray,
    wanted: np.ndarray,
    without: np.ndarray,
    allowed: float,
) -> None:
    """Enter a forward pass into the table; it fails beyond what the program's rounding explains."""
    far = deviation(found, wanted, without)
    LEDGER.append(Measured(program, versions, what, far, allowed))
    assert far <= allowed


def table() -> list[str]:
    """The worst deviation of each program and form, as a table of Markdown."""
    worst: dict[tuple[str, str], Measured] = {}
    for one in LEDGER:
        key = one.program, one.what
        if key not in worst or one.deviation > worst[key].deviation:
            worst[key] = one
    rows = [HEAD, *(_row(one) for _, one in sorted(worst.items()))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in rows
    ]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def _row(one: Measured) -> tuple[str, ...]:
    return (one.program, one.versions, one.what, f"{one.deviation:.1e}", f"{one.allowed:.0e}")
