"""Splitting: pieces by rank or by name that add up to the adapter."""

from pathlib import Path

import numpy as np
import pytest

import loramerge
from tests.build import write_peft
from tests.conftest import factors
from tests.entries import apart
from tests.typed import typed


@pytest.fixture
def here(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with an adapter a of rank 5."""
    write_peft(tmp_path / "a", factors(rng, 5), lora_alpha=5)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def deltas(path: Path) -> dict[str, np.ndarray]:
    loaded = loramerge.load(path)
    read = {name: loaded.read(name) for name in loaded.modules}
    return {name: update.B.astype(float) @ update.A.astype(float) for name, update in read.items()}


@pytest.mark.parametrize(("every", "ranks"), [(1, [1] * 5), (2, [2, 2, 1]), (9, [5])])
def test_pieces_by_rank_add_up_to_the_adapter(here: Path, every: int, ranks: list[int]) -> None:
    done = typed("split", "a", "--every", str(every), "-q")
    assert done.code == 0, done.err
    paths = [Path(line) for line in done.out.splitlines()]
    assert [loramerge.load(path).max_rank for path in paths] == ranks
    pieces = [deltas(path) for path in paths]
    for name, x in deltas(here / "a").items():
        assert apart(sum(piece[name] for piece in pieces), x) < 1e-6  # float32
        lengths = [np.linalg.norm(piece[name]) for piece in pieces]
        assert lengths == sorted(lengths, reverse=True)


def test_pieces_by_name_hold_each_module_once(here: Path) -> None:
    done = typed("split", "a", "--modules", "layers.1.*", "--modules", "*.q_proj", "--out-dir", "p")
    assert done.code == 0, done.err
    pieces = {path.name: deltas(path) for path in sorted((here / "p").iterdir())}
    assert {name: list(piece) for name, piece in pieces.items()} == {
        "modules-1": ["layers.1.down_proj"],
        "modules-2": ["layers.0.q_proj"],
        "rest": ["layers.0.up_proj"],
    }
    whole = deltas(here / "a")
    for piece in pieces.values():
        for name, x in piece.items():
            np.testing.assert_array_equal(x, whole[name])


@pytest.mark.parametrize("words", [(), ("--every", "2", "--modules", "*")])
def test_one_way_of_splitting_is_named(here: Path, words: tuple[str, ...]) -> None:
    done = typed("split", "a", *words)
    assert done.code == 2
    assert "one of --every and --modules" in done.err


def test_nothing_is_split_where_a_piece_would_replace_something(here: Path) -> None:
    (here / "pieces" / "ranks-4-4").mkdir(parents=True)
    done = typed("split", "a", "--every", "1")
    assert done.code == 1
    assert [path.name for path in (here / "pieces").iterdir()] == ["ranks-4-4"]


def test_a_piece_of_ranks_that_are_only_padding_is_zero_and_says_so(here: Path) -> None:
    assert typed("pad", "a", "--rank", "6", "-o", "padded").code == 0
    done = typed("split", "padded", "--every", "5")
    assert done.code == 0, done.err
    assert "6 -> 0, stored as 1" in done.err
    assert not any(delta.any() for delta in deltas(Path("pieces", "ranks-5-5")).values())


def test_a_glob_that_takes_nothing_is_called_as_it_was_typed(here: Path) -> None:
    done = typed("split", "a", "--modules", "q_prj")
    assert done.code == 2
    assert "--modules 'q_prj' matches no module" in done.err
    again = typed("split", "a", "--modules", "layers.*", "--modules", "*.q_proj")
    assert again.code == 2
    assert "'*.q_proj' takes only modules that a glob before it took" in again.err
