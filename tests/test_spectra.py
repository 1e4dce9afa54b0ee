"""inspect --spectrum: singular values are those of dense matrices, energies those of squeeze."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loramerge as lm
from loramerge.spectra import needed, stable_rank
from tests.build import read_deltas, write_peft
from tests.conftest import factors
from tests.typed import shell, typed


@pytest.fixture(autouse=True)
def here(three: list[Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of the adapters a, b, c."""
    monkeypatch.chdir(three[0].parent)
    return three[0].parent


def spectrum(*words: str) -> dict[str, Any]:
    done = typed("inspect", *words, "--spectrum", "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)["spectrum"]


def test_singular_values_are_those_of_the_dense_delta_weight() -> None:
    found = spectrum("c")["modules"]
    for name, delta in read_deltas(Path("c")).items():
        values = np.linalg.svd(delta.astype(np.float64), compute_uv=False)[:6]
        # float32 factors: 1e-6 of the largest
        assert found[name]["singular_values"] == pytest.approx(list(values), abs=1e-6 * values[0])
        square = np.sum(values**2)
        assert found[name]["stable_rank"] == pytest.approx(square / values[0] ** 2, rel=1e-5)
        kept = np.cumsum(values**2) / square
        assert found[name]["rank_99"] == int(np.argmax(kept >= 0.99)) + 1


def test_energy_is_what_squeeze_retains() -> None:
    found = spectrum("c")["energy"]
    assert list(found) == ["1", "2", "4", "6"]
    for rank in (1, 2, 4):
        _, report = lm.squeeze("c", rank=rank, save_dtype="float32")
        # squeeze measures what it stored: float32 factors
        assert found[str(rank)] == pytest.approx(report.energy, abs=1e-6)
    assert found["6"] == 1


@pytest.mark.parametrize(
    ("values", "share", "rank", "stable"),
    [
        ((3.0,), 0.99, 1, 1.0),
        ((2.0, 2.0, 2.0, 2.0), 0.75, 3, 4.0),
        ((4.0, 3.0), 0.64, 1, 25 / 16),
        ((4.0, 3.0), 0.65, 2, 25 / 16),
        ((0.0, 0.0), 0.99, 1, 0.0),
        ((), 0.99, 0, 0.0),
    ],
)
def test_ranks_that_can_be_counted_by_hand(
    values: tuple[float, ...], share: float, rank: int, stable: float
) -> None:
    assert (needed(values, share), stable_rank(values)) == (rank, stable)


def test_every_module_is_drawn_beside_its_name(here: Path) -> None:
    lines = typed("inspect", "a", "--spectrum").out.splitlines()
    energy = next(line for line in lines if line.lstrip().startswith("energy"))
    assert energy.endswith("100 % at 4")
    head = next(n for n, line in enumerate(lines) if line.startswith("module "))
    rows = [line.split() for line in lines[head + 1 :]]
    assert [row[0] for row in rows] == list(lm.load("a").modules)
    assert all(row[1].startswith("█") and len(row[1]) <= 4 for row in rows)


def test_a_terminal_without_blocks_gets_ascii(here: Path) -> None:
    done = shell("loramerge inspect a --spectrum", here, {"PYTHONIOENCODING": "ascii"})
    assert (done.code, done.err) == (0, "")
    assert done.out.isascii()
    assert " @" in done.out


def test_an_adapter_that_is_zero_has_a_spectrum(here: Path, rng: np.random.Generator) -> None:
    zero = {name: (A, 0 * B) for name, (A, B) in factors(rng, 3).items()}
    write_peft(here / "zero", zero)
    found = spectrum("zero")
    assert set(found["energy"].values()) == {1.0}
    assert typed("inspect", "zero", "--spectrum").code == 0


def test_numbers_that_are_none_are_refused(here: Path, rng: np.random.Generator) -> None:
    broken = {name: (A * np.nan, B) for name, (A, B) in factors(rng, 3).items()}
    write_peft(here / "broken", broken)
    done = typed("inspect", "broken", "--spectrum")
    assert (done.code, done.out) == (1, "")
    assert "broken: layers.0.q_proj holds " in done.err
