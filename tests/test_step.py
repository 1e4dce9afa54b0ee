"""`squeeze --step`: the next rank of a schedule, for training stages between which ranks fall."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import loramerge as lm
from loramerge.errors import GateError, UsageError
from tests.build import read_deltas, write_peft
from tests.typed import shell, tree, typed


@pytest.fixture
def adapter(tmp_path: Path, rng: np.random.Generator) -> Path:
    """An adapter of rank 6 with a module that was never trained and one of rank 3."""
    pairs = {
        "lin": (rng.standard_normal((6, 12)), rng.standard_normal((10, 6))),
        "idle": (rng.standard_normal((6, 12)), np.zeros((10, 6))),
        "small": (rng.standard_normal((3, 12)), rng.standard_normal((10, 3))),
    }
    return write_peft(tmp_path / "a", pairs, lora_alpha=12, rank_pattern={"small": 3})


@pytest.mark.parametrize(
    ("schedule", "rank"), [("4", 4), ("6,5,4", 5), ("64,4,2", 4), ("1,2,5,6", 5), ("6,1", 1)]
)
def test_it_takes_the_next_rank_below_the_adapters_own(
    adapter: Path, schedule: str, rank: int
) -> None:
    result, report = lm.squeeze(adapter, step=schedule)
    assert result.adapter.max_rank == rank
    assert report.plan.recipe.canonical()["options"]["step"] == schedule


def test_it_is_squeeze_to_that_rank(adapter: Path, tmp_path: Path) -> None:
    stepped = read_deltas(lm.squeeze(adapter, step="6,4,2")[0].save(tmp_path / "stepped"))
    ranked = read_deltas(lm.squeeze(adapter, rank=4)[0].save(tmp_path / "ranked"))
    for name in ("lin", "idle", "small"):
        np.testing.assert_array_equal(stepped[name], ranked[name])


def test_no_rank_of_the_result_is_dead(adapter: Path, tmp_path: Path) -> None:
    result, report = lm.squeeze(adapter, step="6,5")
    stored = load_file(result.save(tmp_path / "out") / "adapter_model.safetensors")
    for name, kept in (("lin", 5), ("idle", 0), ("small", 3)):
        A = stored[f"base_model.model.{name}.lora_A.weight"]
        B = stored[f"base_model.model.{name}.lora_B.weight"]
        assert A.shape[0] == 5
        assert np.linalg.matrix_rank(A) == 5
        assert np.count_nonzero(B.any(axis=0)) == kept
        assert np.abs(A[kept:]).max(initial=0) <= 12**-0.5
    [note] = [note for note in report.notes if "stored rank" in note]
    assert note.startswith("filled up to the stored rank with terms that begin as in PEFT")
    assert note.endswith(": 2 of 3 modules")
    assert {module.name: module.rank for module in report.modules} == {
        "lin": 5,
        "idle": 0,
        "small": 3,
    }


def test_what_fills_up_follows_the_seed(adapter: Path, tmp_path: Path) -> None:
    def bytes_of(name: str, seed: int) -> bytes:
        saved = lm.squeeze(adapter, step="5", seed=seed)[0].save(tmp_path / f"{name}.safetensors")
        tensors = load_file(saved)
        return tensors["base_model.model.idle.lora_A.weight"].tobytes()

    assert bytes_of("one", 1) == bytes_of("again", 1) != bytes_of("two", 2)


def test_without_a_schedule_what_is_not_there_stays_zero(adapter: Path, tmp_path: Path) -> None:
    stored = load_file(lm.squeeze(adapter, rank=5)[0].save(tmp_path / "out.safetensors"))
    assert not stored["base_model.model.idle.lora_A.weight"].any()


@pytest.mark.parametrize("words", [[], ["--dry-run"], ["--json"], ["-q"]])
def test_where_the_schedule_ends_it_says_so_writes_nothing_and_exits_with_3(
    adapter: Path, words: list[str]
) -> None:
    before = tree(adapter.parent)
    done = typed("squeeze", adapter, "--step", "64,32,6", *words)
    assert (done.code, done.out) == (3, "")
    assert done.lines[0] == (
        "error: The schedule 64,32,6 ends here: the adapter has rank 6 already."
    )
    assert tree(adapter.parent) == before


def test_python_raises_at_the_end_of_the_schedule(adapter: Path) -> None:
    with pytest.raises(GateError, match="ends here: the adapter has rank 6 already"):
        lm.squeeze(adapter, step="6")


def test_a_shell_loop_walks_down_the_schedule(adapter: Path) -> None:
    loop = (
        "x=a; while out=$(loramerge squeeze $x --step 5,4,2 -q 2>end); do echo $out; x=$out; done"
    )
    done = shell(loop, adapter.parent)
    assert (done.code, done.out.split()) == (0, ["a-r5", "a-r5-r4", "a-r5-r4-r2"])
    assert (adapter.parent / "end").read_text().startswith("error: The schedule 5,4,2 ends here")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--step 8,x", "--step is '8,x'; it must be ranks with commas between, such as 64,32,16"),
        ("--step 8,0", "--step is '8,0'"),
        ("--step=", "--step is ''"),
        ("--step 4 --rank 2", "squeeze takes only one of --step and --rank"),
        ("--step 4 --energy 0.9", "squeeze takes only one of --step and --energy"),
        ("--step 4 --allocate sigma", "--allocate needs --rank N"),
    ],
)
def test_what_does_not_go_together_is_refused(adapter: Path, words: str, said: str) -> None:
    done = typed("squeeze", adapter, *words.split())
    assert (done.code, done.out) == (2, "")
    assert said in done.lines[0]


def test_python_refuses_a_bound_beside_a_schedule(adapter: Path) -> None:
    with pytest.raises(UsageError, match="only one of --step and --size"):
        lm.squeeze(adapter, step="4", size="1MB")
