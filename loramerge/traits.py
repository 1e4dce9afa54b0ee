"""What is said of a method beside what it does: where it works, what it costs, how it scored."""

from collections.abc import Mapping
from typing import Literal, TypeAlias

from msgspec import Struct

__all__ = ["COSTS", "JUDGED", "PLACES", "Cost", "Place", "Preset", "Score", "traits"]

# Where a method does its sums, and how long a whole run may take beside one of the plain sum.
Place: TypeAlias = Literal["factors", "thin", "entries"]
Cost: TypeAlias = Literal["sum", "one-shot", "iterative", "dense"]
PLACES: Mapping[Place, str] = {
    "factors": "on the factors of each update",
    "thin": "in the small space all updates span",
    "entries": "on entries in the coordinates of --space",
}
COSTS: Mapping[Cost, str] = {
    "sum": "as fast as the sum",
    "one-shot": "up to 3 times the time of the sum",
    "iterative": "up to 6 times the time of the sum",
    "dense": "minutes for large models, as every delta weight is formed",
}
# What is merged or cut in which suite of the quality table.
JUDGED: Mapping[str, str] = {
    "hard": "eight adapters in one",
    "two": "two adapters in one",
    "run": "two checkpoints of one run",
    "joint": "an adapter of eight tasks at rank 4",
}


class Score(Struct, frozen=True):
    """Exact match measured on the testbed.

    `row` names the line of the quality table that measured it, `suite` what it is a line of.
    """

    exact_match: float
    row: str
    suite: str = "hard"

    @property
    def judged(self) -> str:
        """What was merged or cut."""
        return JUDGED[self.suite]

    @property
    def command(self) -> str:
        """What measures it again."""
        return f'python benchmarks/quality.py --only "{self.suite} {self.row}"'


def traits(needs: str, place: Place, cost: Cost, score: Score | None) -> str:
    """What a method needs, where it works, what it costs and how it scored, in one line."""
    scored = f"; scored {score.exact_match:.3f}, {score.judged}" if score else ""
    return f"needs {needs}; {PLACES[place]}; {COSTS[cost]}{scored}"


class Preset(Struct, frozen=True):
    """A name people search for: a method with some of its values set. Data, not code.

    What these values change of the method's paper, place, cost and score is said here again.
    """

    name: str
    values: Mapping[str, object]
    summary: str
    paper: str
    place: Place
    cost: Cost
    score: Score

    @property
    def traits(self) -> str:
        """The same line as a method's; presets are of merges."""
        return traits("adapters", self.place, self.cost, self.score)
