"""similar: cosines and overlaps of every two adapters are those of dense matrices."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.build import read_deltas, write_peft
from tests.conftest import factors
from tests.typed import typed


@pytest.fixture(autouse=True)
def here(three: list[Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of the adapters a, b, c."""
    monkeypatch.chdir(three[0].parent)
    return three[0].parent


def similar(*words: str) -> dict[tuple[str, str], dict[str, Any]]:
    done = typed("similar", *words, "--json")
    assert done.code == 0, done.err
    return {tuple(pair["adapters"]): pair for pair in json.loads(done.out)["pairs"]}


def bases(delta: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    U, _, Vh = np.linalg.svd(delta.astype(np.float64))
    return U[:, :rank], Vh[:rank].T


def test_every_number_equals_that_of_dense_matrices() -> None:
    found, ranks = similar("a", "b", "c"), {"a": 4, "b": 4, "c": 6}
    assert set(found) == {("a", "b"), ("a", "c"), ("b", "c")}
    for (left, right), pair in found.items():
        deltas = [read_deltas(Path(name)) for name in (left, right)]
        whole = [np.concatenate([d.ravel() for d in side.values()]) for side in deltas]
        lengths = np.linalg.norm(whole[0]) * np.linalg.norm(whole[1])
        assert pair["cosine"] == pytest.approx(whole[0] @ whole[1] / lengths, abs=1e-6)
        for module in pair["modules"]:
            a, b = (side[module["name"]] for side in deltas)
            cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
            # float32 factors: 1e-6
            assert module["cosine"] == pytest.approx(cosine, abs=1e-6)
            sides = zip(bases(a, ranks[left]), bases(b, ranks[right]), strict=True)
            expected = [np.linalg.norm(x.T @ y) ** 2 / 4 for x, y in sides]
            # orthonormal bases by way of float32 Gram matrices
            assert [module["outputs"], module["inputs"]] == pytest.approx(expected, abs=1e-5)
        for side in ("inputs", "outputs"):
            mean = np.mean([module[side] for module in pair["modules"]])
            assert pair[side] == pytest.approx(mean)


def test_an_adapter_is_most_like_itself_and_opposite_to_its_negative(
    here: Path, rng: np.random.Generator
) -> None:
    pairs = factors(rng, 4)
    write_peft(here / "x", pairs)
    write_peft(here / "y", {name: (A, -B) for name, (A, B) in pairs.items()})
    found = similar("a", "x", "y", "x")
    assert next(iter(found)) == ("x", "x")
    assert list(found)[-1] in {("x", "y"), ("y", "x")}
    for pair, cosine in ((("x", "x"), 1), (("x", "y"), -1)):
        assert found[pair]["cosine"] == pytest.approx(cosine)
        assert found[pair]["inputs"] == found[pair]["outputs"] == pytest.approx(1)


def test_one_initial_a_is_seen_as_shared_inputs(here: Path, rng: np.random.Generator) -> None:
    first, second = factors(rng, 4), factors(rng, 4)
    write_peft(here / "x", first)
    write_peft(here / "y", {name: (first[name][0], B) for name, (_, B) in second.items()})
    pair = similar("x", "y")["x", "y"]
    assert pair["inputs"] == pytest.approx(1)
    assert pair["outputs"] < 0.5


def test_a_module_that_one_of_them_lacks_counts_as_zero(
    here: Path, rng: np.random.Generator
) -> None:
    pairs = factors(rng, 4)
    name, *_ = pairs
    write_peft(here / "whole", pairs)
    write_peft(here / "part", {name: pairs[name]})
    pair = similar("whole", "part")["whole", "part"]
    (module,) = pair["modules"]
    assert (module["name"], module["cosine"]) == (name, pytest.approx(1))
    norms = {key: np.linalg.norm(B @ A) for key, (A, B) in pairs.items()}
    total = np.sqrt(sum(norm**2 for norm in norms.values()))
    assert pair["cosine"] == pytest.approx(norms[name] / total, rel=1e-5)


def test_a_zero_update_has_no_cosine_and_no_overlap(here: Path, rng: np.random.Generator) -> None:
    write_peft(here / "zero", {name: (A, 0 * B) for name, (A, B) in factors(rng, 3).items()})
    pair = similar("a", "zero")["a", "zero"]
    assert (pair["cosine"], pair["inputs"], pair["outputs"]) == (None, 0, 0)
    assert "none" in typed("similar", "a", "zero").out


def test_one_adapter_alone_is_refused_and_pairs_are_a_table() -> None:
    done = typed("similar", "a")
    assert (done.code, done.out) == (2, "")
    lines = typed("similar", "a", "b", "c").out.splitlines()
    assert lines[0].split() == ["cosine", "inputs", "outputs"]
    assert {tuple(line.split()[:2]) for line in lines[1:]} == {("a", "b"), ("a", "c"), ("b", "c")}
