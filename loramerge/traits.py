"""What is said of a method beside what it does: where it works, what it costs, how it scored."""

from collections.abc import Mapping
from typing import Literal, TypeAlias

from msgspec import Struct

__all__ = ["COSTS", "PLACES", "Cost", "Place", "Score"]

# Where a method does its sums, and how long a whole run may take beside one of the plain sum.
Place: TypeAlias = Literal["factors", "thin", "entries"]
Cost: TypeAlias = Literal["sum", "one-shot", "iterative"]
PLACES: Mapping[Place, str] = {
    "factors": "on the factors of each update",
    "thin": "in the small space all updates span",
    "entries": "on entries in the coordinates of --space",
}
COSTS: Mapping[Cost, str] = {
    "sum": "as fast as the sum",
    "one-shot": "up to 3 times the time of the sum",
    "iterative": "up to 6 times the time of the sum",
}


class Score(Struct, frozen=True):
    """Exact match measured on the testbed: eight adapters in one, or one squeezed.

    `row` names the line of the quality table that measured it.
    """

    exact_match: float
    row: str

    @property
    def command(self) -> str:
        """What measures it again."""
        return f'python benchmarks/quality.py --only "{self.row}"'
