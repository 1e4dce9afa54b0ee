"""Every method on truly trained adapters: exact match, with the bar it must meet beside it.

python benchmarks/quality.py [--only TEXT] [--split val] [--n 64] [--sets DIR] [--json FILE]

Each row of bars.py is computed with the Python API; the result, as written, is added to the base's
weights, and exact answers are counted. Exit code 1 where a bar is not met. Rows of sets that are
not shipped say so; --make trains them into --sets. The whole table takes two cores about half an
hour; what was counted is kept in --sets, so that the same command goes on where it was stopped.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from bars import KINDS, Bar, Part, Row
from bars import ROWS as ALL
from exactmatch import added, load_adapted, load_base, load_data, scores
from kept import Kept, weights
from sets import MADE, make, place
from testbed import FIXTURE, SIZES
from transformers.utils import logging

import loramerge as lm
from loramerge.adapter import Adapter

NOT_BUILT, NOT_JUDGED, MET, MISSED = "not built yet", "not judged", "met", "MISSED"
NOT_MADE = "not there: --make trains it"
# What our own method must be beside TSV-M at rank 16: no set below it by more than noise, and so
# much on average over the sets of hard tasks.
OURS, THEIRS = "decorrelate --rank 16 --scale size", "tsv --rank 16 --scale paper"
NOISE, GOAL, GOAL_SETS = 0.02, 0.66, ("hard", *KINDS)
MADE_HERE = FIXTURE.parents[1] / ".testbed"
# PEFT adds B @ A up in another order: so many of 8 x 512 answers may turn.
TURNED = 2 / 4096


@dataclass(frozen=True)
class Outcome:
    """What a row came to: exact match by seed (none where there is no result), and a verdict."""

    row: Row
    exact: tuple[float, ...]
    verdict: str
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether the command must fail."""
        return self.verdict not in ("", MET, NOT_BUILT, NOT_JUDGED, NOT_MADE)

    @property
    def line(self) -> str:
        """The row of the table."""
        mean = f"{fmean(self.exact):.4f}" if self.exact else "-"
        spread = f"+-{pstdev(self.exact):.3f}" if len(self.exact) > 1 else ""
        bar = str(self.row.bar or "")
        return (
            f"{self.row.suite:6} {self.row.name:84} {mean:>6} {spread:7} {bar:15} "
            f"{self.seconds:5.1f} s  {self.verdict}"
        )

    def as_json(self) -> dict[str, Any]:
        """The row as plain data."""
        bar = self.row.bar
        return {
            "suite": self.row.suite,
            "name": self.row.name,
            "exact_match": list(self.exact),
            "expected": bar.expected if bar else None,
            "tolerance": bar.tolerance if bar else None,
            "verdict": self.verdict,
            "seconds": round(self.seconds, 2),
        }


class Judge:
    """The base and the data, loaded once."""

    def __init__(self, split: str, count: int, made: Path = MADE_HERE) -> None:
        self.made = made
        self.kept = Kept(made / "counted.txt")
        self.base = load_base(FIXTURE)
        self.data = load_data(FIXTURE, split, count)
        self.binding = split == "test" and count >= SIZES["test"]

    def outcome(self, row: Row) -> Outcome:
        """Compute and measure one row."""
        if row.method and row.method not in dir(lm):
            return Outcome(row, (), NOT_BUILT)
        if not all(Path(path).exists() for part in row.parts for path in self.paths(part)):
            return Outcome(row, (), NOT_MADE)
        began = time.perf_counter()
        try:
            exact = tuple(
                fmean(self.exact(row, part, seed) for part in row.parts)
                for seed in range(row.seeds)
            )
        except lm.errors.LoramergeError as error:
            return Outcome(row, (), f"ERROR: {error}")
        verdict = self._verdict(row.bar, fmean(exact))
        return Outcome(row, exact, verdict, time.perf_counter() - began)

    def _verdict(self, bar: Bar | None, found: float) -> str:
        if bar is None:
            return ""
        if not self.binding:
            return NOT_JUDGED
        return MET if bar.holds(found) else MISSED

    def paths(self, part: Part) -> list[str]:
        """Where the adapters of a part lie, or would lie."""
        return [str(place(name, self.made)) for name in part.adapters]

    def exact(self, row: Row, part: Part, seed: int) -> float:
        """The mean exact match of one part's model over its tasks."""
        adapters = self.paths(part)
        if row.method:
            result, _ = lm.run(row.method, adapters, seed=seed, **row.values)
            return self.of(result.adapter, part.tasks)
        return self.of(lm.load(adapters[0]) if adapters else None, part.tasks)

    def of(self, adapter: Adapter | None, tasks: Sequence[str]) -> float:
        """The mean exact match over tasks of the base with an adapter added."""
        known, digest = self.kept.found, weights(adapter)
        questions = {task: self.kept.question(digest, self.data[task]) for task in tasks}
        if missing := [task for task, question in questions.items() if question not in known]:
            with added(self.base, adapter) as model:
                for task, found in scores(model, self.data, missing).items():
                    self.kept.add(questions[task], found.exact)
        return fmean(known[question] for question in questions.values())

    def agreement(self, row: Row) -> tuple[float, float]:
        """The exact match of a row's model as we add it to the base, and as PEFT merges it."""
        (part,) = row.parts
        adapters = self.paths(part)
        with tempfile.TemporaryDirectory() as directory:
            result, _ = lm.run(row.method, adapters, **row.values)
            merged = load_adapted(FIXTURE, result.save(Path(directory) / "merged"))
        theirs = scores(merged, self.data, part.tasks).values()
        return self.of(result.adapter, part.tasks), fmean(found.exact for found in theirs)


def main(words: Sequence[str] | None = None, rows: Sequence[Row] = ALL) -> int:
    """Print the table; 1 where a bar is missed, a row fails, or PEFT disagrees."""
    arguments = _parser().parse_args(words)
    logging.disable_progress_bar()
    began = time.perf_counter()
    chosen = [row for row in rows if _named(row, arguments.only)]
    if arguments.make is not None:
        make(arguments.sets, arguments.make or tuple(MADE))
    judge = Judge(arguments.split, arguments.n, arguments.sets)
    print(f"exact match, {arguments.split} split, {arguments.n} sequences a task", flush=True)
    outcomes = []
    for row in chosen:
        outcomes.append(judge.outcome(row))
        print(outcomes[-1].line, flush=True)
    agrees = _agrees(judge, next(row for row in ALL if row.method == "arithmetic"))
    if arguments.json:
        facts = {
            "split": arguments.split,
            "n": arguments.n,
            "version": lm.__version__,
            "rows": [outcome.as_json() for outcome in outcomes],
        }
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")
    if arguments.record and judge.binding:
        record(arguments.record, outcomes)
    reached = _goal(outcomes, judge.binding)
    _conclude(outcomes, time.perf_counter() - began)
    return int(not agrees or not reached or any(outcome.failed for outcome in outcomes))


def record(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Put what was measured into the file that docs/make.py draws the page from, a row a line.

    Rows that were not measured now stay, and those that there are no longer go.
    """
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    passing = ("verdict", "seconds")
    measured = [
        {key: value for key, value in outcome.as_json().items() if key not in passing}
        for outcome in outcomes
        if outcome.exact
    ]
    rows = {(row["suite"], row["name"]): row for row in [*known, *measured]}
    order = [(row.suite, row.name) for row in ALL]
    lines = [json.dumps(rows[key]) for key in order if key in rows]
    path.write_text('{"rows": [\n' + ",\n".join(lines) + "\n]}\n")


def _named(row: Row, only: Sequence[str]) -> bool:
    return not only or any(text in f"{row.suite} {row.name}" for text in only)


def _agrees(judge: Judge, row: Row) -> bool:
    ours, theirs = judge.agreement(row)
    print(f"merged by PEFT instead, {row.name}: {theirs:.4f}, here {ours:.4f}")
    return abs(ours - theirs) <= TURNED


def _goal(outcomes: Sequence[Outcome], binding: bool) -> bool:
    """Print our own method beside TSV-M on each set; whether it is behind on none.

    Where all sets were asked for, its mean must reach the goal too.
    """
    found = {(one.row.suite, one.row.name): fmean(one.exact) for one in outcomes if one.exact}
    pairs = {
        suite: (found[suite, OURS], found[suite, THEIRS])
        for suite in GOAL_SETS
        if {(suite, OURS), (suite, THEIRS)} <= set(found)
    }
    if not pairs:
        return True
    shown = ", ".join(
        f"{suite} {ours:.3f} ({ours - theirs:+.3f})" for suite, (ours, theirs) in pairs.items()
    )
    mean = fmean(ours for ours, _ in pairs.values())
    far = len(pairs) == len(GOAL_SETS) and mean < GOAL
    good = not far and all(ours >= theirs - NOISE for ours, theirs in pairs.values())
    verdict = (MET if good else MISSED) if binding else NOT_JUDGED
    print(
        f"{OURS} (against tsv, behind by no more than {NOISE:.2f}): {shown}: {verdict}; "
        f"mean {mean:.3f}, of all at least {GOAL:.2f}"
    )
    return good or not binding


def _conclude(outcomes: Sequence[Outcome], seconds: float) -> None:
    counts = [
        f"{sum(outcome.verdict == verdict for outcome in outcomes)} {verdict}"
        for verdict in (MET, MISSED, NOT_JUDGED, NOT_BUILT, NOT_MADE)
    ]
    errors = sum(outcome.verdict.startswith("ERROR") for outcome in outcomes)
    print(f"{len(outcomes)} rows: {', '.join(counts)}, {errors} errors; {seconds:.0f} s")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", action="append", default=[], help="rows whose suite and name hold this text")
    add("--split", choices=SIZES, default="test", help="val to choose constants by")
    add("--n", type=int, default=SIZES["test"], help="sequences a task; bars bind at 512")
    add("--sets", type=Path, default=MADE_HERE, help="where sets lie that are not shipped")
    add("--make", nargs="*", choices=MADE, help="train these that are missing, or all")
    add("--json", type=Path, help="write the rows here too")
    add("--record", type=Path, help="put them into this file: docs/measured/quality.json")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
