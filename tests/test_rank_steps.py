"""--round-to: ranks come in multiples, and no bound on rank or size is broken for it."""

import math
from itertools import product
from pathlib import Path

import pytest

import loramerge as lm
from loramerge.errors import UsageError
from loramerge.linalg.ranks import Allocation, Criterion, choose
from loramerge.recipe import Named, make_recipe
from tests.test_ranks import (
    GREEDY,
    UNEQUAL,
    Spectra,
    each_greedy,
    each_seed,
    gains,
    kept,
    parameters,
    size_of,
    spectra,
    worth,
)
from tests.typed import TESTBED, typed

SHAPES = {f"m{i}": (24, 24) for i in range(4)}
# All but the last hold a multiple of 4.
LENGTHS = (8, 4, 12, 6)
each_step = pytest.mark.parametrize("step", [1, 2, 4, 8])


def chosen(
    values: Spectra, allocation: Allocation | None = None, uniform: bool = False, **bound: object
) -> dict[str, int]:
    return choose(values, SHAPES, Criterion(**bound), allocation, size_of(SHAPES), uniform)


def rounded(ranks: dict[str, int], values: Spectra, step: int) -> dict[str, int]:
    """Up to a multiple, or to all there are."""
    return {n: min(math.ceil(r / step) * step, len(values[n])) for n, r in ranks.items()}


@each_seed
@each_step
@pytest.mark.parametrize(
    "bound", [{"energy": 0.9}, {"max_error": 0.3}, {"sv_ratio": 5.0}, {"sv_fro": 0.8}]
)
def test_what_a_module_must_keep_is_rounded_up_to_a_multiple_or_all_it_has(
    seed: int, step: int, bound: dict[str, float]
) -> None:
    values = spectra(seed, LENGTHS)
    exact = chosen(values, **bound)
    assert chosen(values, step=step, **bound) == rounded(exact, values, step)
    level = dict.fromkeys(values, max(rounded(exact, values, step).values()))
    assert chosen(values, step=step, uniform=True, **bound) == rounded(level, values, 1)


@each_seed
@each_greedy
@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize("rank", [4, 5, 8])
def test_a_mean_rank_is_spent_in_steps_as_brute_force_would(
    seed: int, allocation: Allocation, step: int, rank: int
) -> None:
    # Where a module's last step is short, it may fit where a better one does not.
    values = spectra(seed, (8, 4, 12, 8))
    budget = parameters(SHAPES, {name: min(rank, len(s)) for name, s in values.items()})
    gain = gains(values, allocation)
    choices = product(*(range(0, len(s) + 1, step) for s in values.values()))
    every = [dict(zip(values, ranks, strict=True)) for ranks in choices]
    best = max(worth(gain, r) for r in every if parameters(SHAPES, r) <= budget)
    found = chosen(values, allocation, rank=rank, step=step)
    assert found in every
    assert parameters(SHAPES, found) <= budget
    assert worth(gain, found) == pytest.approx(best, rel=1e-12)


@each_seed
@each_step
@pytest.mark.parametrize("allocation", [None, "uniform", *GREEDY])
@pytest.mark.parametrize("share", [0.3, 0.6, 1.0])
def test_a_size_is_never_exceeded_for_a_multiple(
    seed: int, step: int, allocation: Allocation | None, share: float
) -> None:
    values, size = spectra(seed), size_of(UNEQUAL)
    full = {name: len(s) for name, s in values.items()}
    bound = int(share * size(full))
    found = choose(values, UNEQUAL, Criterion(size=bound, step=step), allocation, size, False)
    assert size(found) <= bound
    assert share < 1 or found == full
    assert all(rank % step == 0 or rank == len(values[name]) for name, rank in found.items())


@each_seed
@each_greedy
def test_where_unequal_ranks_lengthen_the_file_whole_steps_are_given_back(
    seed: int, allocation: Allocation
) -> None:
    values = spectra(seed, (8, 8, 8, 8))

    def size(ranks: dict[str, int]) -> int:
        return 4 * parameters(SHAPES, ranks) + 500 * (len(set(ranks.values())) - 1)

    bound = size(dict.fromkeys(values, 4)) + 600
    found = choose(values, SHAPES, Criterion(size=bound, step=4), allocation, size, False)
    assert size(found) <= bound
    assert set(found.values()) <= {0, 4, 8}


@each_seed
@each_greedy
@each_step
def test_an_energy_of_the_adapter_is_met_and_the_last_step_was_needed(
    seed: int, allocation: Allocation, step: int
) -> None:
    values = spectra(seed, LENGTHS)
    found = chosen(values, allocation, energy=0.9, step=step)
    assert kept(values, found) >= 0.9 - 1e-12
    assert all(rank % step == 0 or rank == len(values[name]) for name, rank in found.items())
    fewer = [{**found, n: (r - 1) // step * step} for n, r in found.items() if r]
    assert any(kept(values, ranks) < 0.9 for ranks in fewer)


@each_seed
@each_step
def test_one_rank_for_all_is_the_smallest_multiple_that_holds_the_energy(
    seed: int, step: int
) -> None:
    values = spectra(seed, LENGTHS)
    common = [{n: min(r, len(s)) for n, s in values.items()} for r in (*range(0, 12, step), 12)]
    expected = next(ranks for ranks in common if kept(values, ranks) >= 0.9)
    assert chosen(values, "uniform", energy=0.9, step=step) == expected


def test_files_hold_multiples_and_no_more_than_a_rank_that_was_given() -> None:
    adapter = TESTBED / "sh3_rev"  # rank 16
    _, free = lm.squeeze(adapter, energy=0.99)
    _, steps = lm.squeeze(adapter, energy=0.99, round_to=8)
    assert {m.rank for m in steps.modules} == {8, 16}
    assert [m.rank for m in steps.modules] == [math.ceil(m.rank / 8) * 8 for m in free.modules]
    _, capped = lm.squeeze(adapter, sv_fro=0.995, round_to=8, rank=12)
    assert {m.rank for m in capped.modules} == {8, 12}
    _, spread = lm.squeeze(adapter, rank=8, allocate="relative", round_to=4)
    assert {m.rank % 4 for m in spread.modules} == {0}
    shapes = {name: module.shape for name, module in lm.load(adapter).modules.items()}
    spent = parameters(shapes, {m.name: m.rank for m in spread.modules})
    assert spent <= parameters(shapes, dict.fromkeys(shapes, 8))


@each_seed
@each_step
def test_one_stored_rank_is_the_largest_multiple_of_a_rank_that_was_given(
    seed: int, step: int
) -> None:
    values = spectra(seed, LENGTHS)
    found = chosen(values, "energy", uniform=True, rank=9, step=step)
    assert found == {name: min(9 // step * step, len(s)) for name, s in values.items()}


def test_a_multiple_beyond_the_rank_that_was_given_is_refused() -> None:
    values = {"rank": 4, "allocate": "energy", "round_to": 8}
    with pytest.raises(UsageError, match="--round-to 8 is more than --rank 4") as refused:
        make_recipe("squeeze", [Named("a")], values)
    assert refused.value.hint == "for example: --rank 8"


def test_terms_that_were_pruned_are_zeros_in_a_multiple(three: list[Path]) -> None:
    _, report = lm.prune(three[2], keep=3, round_to=4)
    assert {(m.rank, m.stored_rank) for m in report.modules} == {(3, 4)}


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("squeeze", {"rank": 8}),
        ("squeeze", {"rank": 8, "allocate": "uniform"}),
        ("arithmetic", {}),
        ("arithmetic", {"rank": "full"}),
        ("prune", {"rank": 2}),
    ],
)
def test_a_rank_that_is_given_is_not_rounded(method: str, values: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="--round-to needs ranks to choose") as refused:
        make_recipe(method, [Named("a")], {"round_to": 8, **values})
    assert refused.value.hint


def test_a_size_below_one_multiple_in_every_module_is_refused(
    three: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(three[0].parent)
    done = typed("squeeze", "c", "--size", "3200", "--round-to", "4", "--dry-run")
    assert done.code == 2
    assert "bytes of rank 4 per module" in done.lines[0]
    assert typed("squeeze", "c", "--size", "3200", "--dry-run").code == 0
