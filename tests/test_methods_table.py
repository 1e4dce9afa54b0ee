"""What `loramerge methods` and the pages say of a method: needs, cost, and a score that was run."""

import importlib
import json
from statistics import fmean
from types import ModuleType

import pytest

from loramerge.registry import methods
from loramerge.traits import COSTS
from tests.typed import ROOT, typed

each_method = pytest.mark.parametrize("name", methods())
NAMED = {one.name: one for m in methods().values() for one in (m, *m.presets)}
SCORED = {name: one for name, one in NAMED.items() if one.score is not None}
each_scored = pytest.mark.parametrize("name", SCORED)


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("bars")


@each_scored
def test_a_score_is_that_of_a_row_of_the_quality_table(name: str, bars: ModuleType) -> None:
    score = SCORED[name].score
    assert score is not None
    rows = [row for row in bars.ROWS if (row.suite, row.name) == (score.suite, score.row)]
    assert len(rows) == 1
    assert score.judged
    assert 0 < score.exact_match < 1
    assert score.command == f'python benchmarks/quality.py --only "{score.suite} {score.row}"'


@each_scored
def test_a_score_is_what_was_measured(name: str) -> None:
    rows = json.loads((ROOT / "docs" / "measured" / "quality.json").read_text("utf-8"))["rows"]
    score = SCORED[name].score
    assert score is not None
    (found,) = (row for row in rows if (row["suite"], row["name"]) == (score.suite, score.row))
    assert fmean(found["exact_match"]) == pytest.approx(score.exact_match, abs=6e-4)


def test_what_was_measured_are_rows_of_the_table_and_meets_their_bars(bars: ModuleType) -> None:
    stored = json.loads((ROOT / "docs" / "measured" / "quality.json").read_text("utf-8"))["rows"]
    rows = {(row.suite, row.name): row for row in bars.ROWS}
    assert [(one["suite"], one["name"]) for one in stored] == list(rows)
    for one in stored:
        bar = rows[one["suite"], one["name"]].bar
        assert one["expected"] == (bar.expected if bar else None)
        assert bar is None or bar.holds(fmean(one["exact_match"])), one["name"]


def test_every_time_that_is_promised_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    measured = importlib.import_module("speed").COSTS
    promised: dict[str, set[str]] = {cost: set() for cost in measured}
    for name, one in NAMED.items():
        promised.get(one.cost, set()).add(name)
    assert {cost: set(names.split()) for cost, (names, _) in measured.items()} == promised
    for cost, (_, most) in measured.items():
        assert f"up to {most} times" in COSTS[cost]


def test_every_method_that_is_no_surgery_has_a_score() -> None:
    without = {method.name for method in methods().values() if method.score is None}
    assert without == {method.name for method in methods().values() if method.surgery}


@each_method
def test_terminal_json_and_page_say_the_same(name: str) -> None:
    method = methods()[name]
    shown = " ".join(typed("methods").out.split())
    (row,) = (r for r in json.loads(typed("methods", "--json").out)["methods"] if r["name"] == name)
    page = (ROOT / "docs" / "methods" / f"{name}.md").read_text("utf-8")
    assert row["needs"] == method.needs
    assert f"{method.traits[0].upper()}{method.traits[1:]}." in page
    assert [preset["name"] for preset in row["presets"]] == [one.name for one in method.presets]
    for said, one in zip([row, *row["presets"]], [method, *method.presets], strict=True):
        score = one.score
        assert one.traits in shown
        assert one.paper in shown
        assert (said["paper"], said["place"], said["cost"]) == (one.paper, one.place, one.cost)
        assert said["exact_match"] == (score.exact_match if score else None)
        assert said["of"] == (score.judged if score else None)
        assert said["measured_by"] == (score.command if score else None)
        assert score is None or f"scored {score.exact_match:.3f}, {score.judged}" in page
    assert method.score is None or method.score.command in page
