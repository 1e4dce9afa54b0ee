"""What `loramerge methods` and the pages say of a method: needs, cost, and a score that was run."""

import importlib
import json
from types import ModuleType

import pytest

from loramerge.registry import methods
from tests.typed import ROOT, typed

each_method = pytest.mark.parametrize("name", methods())
each_scored = pytest.mark.parametrize("name", [m.name for m in methods().values() if m.score])


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("bars")


@each_scored
def test_a_score_is_that_of_a_row_of_the_quality_table(name: str, bars: ModuleType) -> None:
    score = methods()[name].score
    assert [row for row in bars.ROWS if row.suite == "hard" and row.name == score.row]
    assert 0 < score.exact_match < 1
    assert score.command == f'python benchmarks/quality.py --only "{score.row}"'


@each_method
def test_terminal_json_and_page_say_the_same(name: str) -> None:
    method, score = methods()[name], methods()[name].score
    shown = " ".join(typed("methods").out.split())
    assert method.traits in shown
    (row,) = (r for r in json.loads(typed("methods", "--json").out)["methods"] if r["name"] == name)
    assert (row["needs"], row["place"], row["cost"]) == (method.needs, method.place, method.cost)
    assert row["exact_match"] == (score.exact_match if score else None)
    assert row["measured_by"] == (score.command if score else None)
    page = (ROOT / "docs" / "methods" / f"{name}.md").read_text("utf-8")
    assert f"{method.traits[0].upper()}{method.traits[1:]}." in page
    assert score is None or (f"scored {score.exact_match:.3f}" in page and score.command in page)
