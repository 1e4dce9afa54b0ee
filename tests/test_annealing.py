"""The example of rank annealing: it trains with PEFT, squeezes, trains on, and prints its table."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]

# PEFT asks transformers under a name that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture
def annealing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/annealing.py, found as it is when it is run."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("annealing")


@pytest.fixture
def course(annealing: Any, tmp_path: Path) -> Any:
    """Four steps on two sequences at a time."""
    base = annealing.load_base(annealing.FIXTURE)
    data = annealing.sample("sh3_rev", 16, torch.Generator().manual_seed(0))
    return annealing.Course(base, data, 4, tmp_path, batch=2)


def rank_of(adapter: Path) -> int:
    return json.loads((adapter / "adapter_config.json").read_text())["r"]


def test_annealing_goes_down_the_schedule_and_trains_every_stage(course: Any) -> None:
    assert rank_of(course.annealed(4)) == 4
    for rank in (16, 8, 4):
        start, end = (course.room / f"anneal-4-{rank}{part}" for part in ("-start", ""))
        assert rank_of(start) == rank_of(end) == rank
        before, after = (load_file(d / "adapter_model.safetensors") for d in (start, end))
        assert before.keys() == after.keys()
        assert all(not torch.equal(before[key], after[key]) for key in before)


def test_a_stage_trains_on_from_where_it_starts(course: Any) -> None:
    start = course.stage(4, 0, 2, "start")
    same = course.stage(start, 2, 2, "same")
    before, after = (load_file(d / "adapter_model.safetensors") for d in (start, same))
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_quick_table_has_a_row_for_every_way(
    annealing: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annealing.main(["--quick", "--write", str(tmp_path / "table.md")])
    caption, _, written = (tmp_path / "table.md").read_text().partition("\n\n")
    assert caption == annealing.CAPTION
    lines = written.splitlines()
    assert capsys.readouterr().out.splitlines() == lines
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["steps", "sh3_rev", "rank 4"]
    assert [row[1] for row in cells[2:]] == [
        *annealing.WAYS.values(),
        *(annealing.WAYS[way] for way in ("direct", "post", "cont")),
    ]
    assert all(0 <= float(row[2]) <= 1 for row in cells[2:])
    # The testbed's adapters of rank 32 lose nothing at rank 4 (quality: 1.000 of 1.000).
    assert float(cells[-2][2]) > 0.9
