"""diff: what it says of two adapters equals dense matrices, and it can be a gate."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.build import read_deltas, write_peft
from tests.typed import typed


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, which holds the adapters of `three` where a test asks for them."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def facts(*words: str) -> dict[str, dict[str, float]]:
    found = json.loads(typed("diff", *words, "--json").out)
    return {row["name"]: row for row in [found["whole"], *found["modules"]]}


def test_every_number_equals_that_of_dense_matrices(three: list[Path]) -> None:
    left, right = read_deltas(three[0]), read_deltas(three[2])
    for name, found in facts("a", "c").items():
        if name == "whole adapter":
            a, b = (np.concatenate([x.ravel() for x in side.values()]) for side in (left, right))
        else:
            a, b = left[name].ravel(), right[name].ravel()
        gap, lengths = np.linalg.norm(a - b), (np.linalg.norm(a), np.linalg.norm(b))
        # float32 Gram matrices where nothing cancels: 1e-5.
        assert found["relative"] == pytest.approx(gap / lengths[0], rel=1e-5)
        assert found["cosine"] == pytest.approx(a @ b / lengths[0] / lengths[1], abs=1e-5)
        assert found["norm_ratio"] == pytest.approx(lengths[1] / lengths[0], rel=1e-5)


def test_an_adapter_does_not_differ_from_itself(three: list[Path]) -> None:
    assert facts("a", "a")["whole adapter"]["relative"] < 1e-12
    assert typed("diff", "a", "a", "--fail-above", "0.000001").code == 0


def test_a_difference_above_the_gate_exits_3_and_names_the_module(three: list[Path]) -> None:
    done = typed("diff", "a", "b", "--fail-above", "0.5")
    assert done.code == 3
    assert "differs by" in done.err
    assert "whole adapter" in done.out


def test_a_module_only_one_adapter_has_counts_as_zero_in_the_other(
    three: list[Path], rng: np.random.Generator, here: Path
) -> None:
    pairs = {name: (rng.random((2, 4)), rng.random((4, 2))) for name in ("x", "y")}
    write_peft(here / "both", pairs)
    write_peft(here / "one", {"x": pairs["x"]})
    found = facts("both", "one")
    assert found["y"]["relative"] == pytest.approx(1.0)
    assert found["x"]["relative"] < 1e-6
    assert "only in both" in typed("diff", "both", "one").out


@pytest.mark.parametrize("bound", ["-1", "nan", "much"])
def test_a_gate_that_is_no_bound_is_refused(three: list[Path], bound: str) -> None:
    assert typed("diff", "a", "b", f"--fail-above={bound}").code == 2


@pytest.mark.parametrize("command", ["diff", "similar"])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_none_are_refused_and_pass_no_gate(
    command: str, number: float, here: Path, rng: np.random.Generator
) -> None:
    A, B = rng.random((2, 4)), rng.random((4, 2))
    write_peft(here / "sound", {"x": (A, B)})
    A[0, 0] = number
    write_peft(here / "broken", {"x": (A, B)})
    for pair in (("broken", "broken"), ("sound", "broken")):
        done = typed(command, *pair)
        assert (done.code, done.out) == (1, "")
        assert "broken: x holds " in done.err
