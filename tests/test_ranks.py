"""Which ranks are kept, against brute force over every choice there is."""

from collections.abc import Iterator, Mapping
from itertools import product

import numpy as np
import pytest

from loramerge.linalg.ranks import Allocation, Criterion, choose

Spectra = dict[str, np.ndarray]

GREEDY: tuple[Allocation, ...] = ("relative", "sigma", "energy")
each_greedy = pytest.mark.parametrize("allocation", GREEDY)
each_seed = pytest.mark.parametrize("seed", range(5))
# The bytes of a header that names every module, for the file sizes of these tests.
HEADER = 100


def spectra(seed: int, lengths: tuple[int, ...] = (4, 3, 5, 2)) -> Spectra:
    """Descending singular values of a few modules whose norms differ by orders of magnitude."""
    rng = np.random.default_rng(seed)
    return {
        f"m{i}": np.sort(rng.exponential(size=length))[::-1] * 10 ** rng.uniform(-1, 1)
        for i, length in enumerate(lengths)
    }


EQUAL = {f"m{i}": (8, 8) for i in range(4)}
UNEQUAL = {"m0": (8, 8), "m1": (20, 4), "m2": (5, 5), "m3": (64, 8)}


def everything(spectra: Spectra) -> Iterator[dict[str, int]]:
    """Every choice of ranks."""
    for ranks in product(*(range(len(s) + 1) for s in spectra.values())):
        yield dict(zip(spectra, ranks, strict=True))


def kept(spectra: Spectra, ranks: Mapping[str, int]) -> float:
    """The share of all squared singular values that is kept."""
    total = sum((s**2).sum() for s in spectra.values())
    return sum((s[: ranks[name]] ** 2).sum() for name, s in spectra.items()) / total


def parameters(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int]) -> int:
    return sum(rank * sum(shapes[name]) for name, rank in ranks.items())


def gains(spectra: Spectra, allocation: Allocation) -> Spectra:
    """What each rank is worth under an allocation."""
    return {
        name: {"relative": s**2 / (s**2).sum(), "sigma": s, "energy": s**2}[allocation]
        for name, s in spectra.items()
    }


def worth(gain: Spectra, ranks: Mapping[str, int]) -> float:
    return sum(float(g[: ranks[name]].sum()) for name, g in gain.items())


def size_of(shapes: Mapping[str, tuple[int, int]], width: int = 4):
    """Bytes of a file: a header entry for each kept module, `width` bytes for each parameter."""

    def size(ranks: Mapping[str, int]) -> int:
        return HEADER * sum(r > 0 for r in ranks.values()) + width * parameters(shapes, ranks)

    return size


def chosen(
    spectra: Spectra,
    criterion: Criterion,
    allocation: Allocation | None = None,
    shapes: Mapping[str, tuple[int, int]] = EQUAL,
    uniform: bool = False,
    width: int = 4,
) -> dict[str, int]:
    return choose(spectra, shapes, criterion, allocation, size_of(shapes, width), uniform)


@each_seed
@pytest.mark.parametrize("energy", [0.05, 0.5, 0.9, 0.999, 1.0])
def test_energy_keeps_the_fewest_ranks_of_each_module_that_hold_it(
    seed: int, energy: float
) -> None:
    found = chosen(values := spectra(seed), Criterion(energy=energy))
    for name, s in values.items():
        shares = [(s[:rank] ** 2).sum() / (s**2).sum() for rank in range(len(s) + 1)]
        # 1 - 1e-12: a share of 1 must not fail by rounding of the sum
        assert found[name] == next(r for r, share in enumerate(shares) if share >= energy - 1e-12)


@each_seed
@pytest.mark.parametrize("bound", [0.01, 0.3, 0.7])
def test_max_error_holds_in_each_module_and_one_rank_less_would_break_it(
    seed: int, bound: float
) -> None:
    found = chosen(values := spectra(seed), Criterion(max_error=bound))
    for name, s in values.items():
        errors = [np.sqrt((s[rank:] ** 2).sum() / (s**2).sum()) for rank in range(len(s) + 1)]
        assert errors[found[name]] <= bound
        assert errors[found[name] - 1] > bound


@each_seed
def test_one_stored_rank_is_the_largest_any_module_needs(seed: int) -> None:
    values = spectra(seed)
    single = chosen(values, Criterion(energy=0.8))
    level = chosen(values, Criterion(energy=0.8), uniform=True)
    assert level == {name: min(max(single.values()), len(s)) for name, s in values.items()}


@each_seed
@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999])
def test_uniform_energy_is_the_smallest_common_rank_that_holds_it_over_the_adapter(
    seed: int, energy: float
) -> None:
    values = spectra(seed)
    common = [{name: min(r, len(s)) for name, s in values.items()} for r in range(6)]
    expected = next(ranks for ranks in common if kept(values, ranks) >= energy)
    assert chosen(values, Criterion(energy=energy), "uniform") == expected


@each_seed
@each_greedy
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_mean_rank_is_spent_as_brute_force_would_where_all_modules_cost_the_same(
    seed: int, allocation: Allocation, rank: int
) -> None:
    values = spectra(seed)
    gain = gains(values, allocation)
    budget = parameters(EQUAL, {name: min(rank, len(s)) for name, s in values.items()})
    best = max(worth(gain, r) for r in everything(values) if parameters(EQUAL, r) <= budget)
    found = chosen(values, Criterion(rank=rank), allocation)
    assert parameters(EQUAL, found) <= budget
    assert worth(gain, found) == pytest.approx(best, rel=1e-12)


@each_seed
@each_greedy
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_with_unequal_costs_it_is_at_most_one_rank_short_of_brute_force(
    seed: int, allocation: Allocation, rank: int
) -> None:
    values = spectra(seed)
    gain = gains(values, allocation)
    budget = parameters(UNEQUAL, {name: min(rank, len(s)) for name, s in values.items()})
    best = max(worth(gain, r) for r in everything(values) if parameters(UNEQUAL, r) <= budget)
    found = chosen(values, Criterion(rank=rank), allocation, UNEQUAL)
    assert parameters(UNEQUAL, found) <= budget
    # The bound of greedy knapsack: what the first rank that no longer fits is worth.
    assert worth(gain, found) >= best - max(float(g.max()) for g in gain.values())


@each_seed
@each_greedy
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_each_rank_taken_is_the_one_worth_most_per_parameter_that_fits(
    seed: int, allocation: Allocation, rank: int
) -> None:
    values = spectra(seed)
    gain = gains(values, allocation)
    left = parameters(UNEQUAL, {name: min(rank, len(s)) for name, s in values.items()})
    expected = dict.fromkeys(values, 0)
    while True:
        fitting = [
            name
            for name, s in values.items()
            if expected[name] < len(s) and sum(UNEQUAL[name]) <= left
        ]
        if not fitting:
            break
        best = max(fitting, key=lambda name: gain[name][expected[name]] / sum(UNEQUAL[name]))
        expected[best] += 1
        left -= sum(UNEQUAL[best])
    assert chosen(values, Criterion(rank=rank), allocation, UNEQUAL) == expected


@each_seed
def test_energy_over_the_adapter_takes_as_few_ranks_as_brute_force(seed: int) -> None:
    values = spectra(seed)
    found = chosen(values, Criterion(energy=0.9), "energy")
    fewest = min(sum(r.values()) for r in everything(values) if kept(values, r) >= 0.9)
    assert kept(values, found) >= 0.9
    assert sum(found.values()) == fewest


@each_seed
@each_greedy
@pytest.mark.parametrize("bound", [0.1, 0.5])
def test_max_error_with_an_allocation_holds_over_the_adapter(
    seed: int, allocation: Allocation, bound: float
) -> None:
    values = spectra(seed)
    found = chosen(values, Criterion(max_error=bound), allocation, UNEQUAL)
    assert 1 - kept(values, found) <= bound**2
    # Nothing is taken after the bound is met: some rank could not be given back.
    fewer = [{**found, name: found[name] - 1} for name in found if found[name]]
    assert any(1 - kept(values, ranks) > bound**2 for ranks in fewer)


@each_seed
@pytest.mark.parametrize("allocation", [None, "uniform", *GREEDY])
@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("share", [0.3, 0.55, 0.8, 1.0])
def test_size_is_never_exceeded_and_the_cheapest_further_rank_would(
    seed: int, allocation: Allocation | None, width: int, share: float
) -> None:
    values, size = spectra(seed), size_of(UNEQUAL, width)
    full = {name: len(s) for name, s in values.items()}
    bound = int(size(full) * share)
    found = chosen(values, Criterion(size=bound), allocation, UNEQUAL, width=width)
    assert size(found) <= bound
    if allocation in GREEDY:
        # The overhead is that of the full file; a header entry may be left over for each module.
        more = [{**found, n: found[n] + 1} for n in found if found[n] < full[n]]
        slack = HEADER * len(values)
        assert all(size(ranks) + slack > bound for ranks in more)
    else:
        rank = max(found.values())
        above = {name: min(rank + 1, len(s)) for name, s in values.items()}
        assert found == full or size(above) > bound


@each_greedy
def test_ranks_of_a_module_are_taken_from_the_first(allocation: Allocation) -> None:
    # The tail of one module is worth more than the head of the other, but cannot come first.
    values = {"big": np.array([5.0, 4.0, 3.0]), "small": np.array([1.0, 0.5])}
    shapes = {"big": (8, 8), "small": (8, 8)}
    found = chosen(values, Criterion(rank=1), allocation, shapes)
    assert found == ({"big": 2, "small": 0} if allocation != "relative" else {"big": 1, "small": 1})


@pytest.mark.parametrize("allocation", [None, "uniform", *GREEDY])
def test_a_zero_module_asks_for_no_rank(allocation: Allocation | None) -> None:
    values = {"zero": np.zeros(3), "one": np.array([2.0, 1.0, 0.5])}
    found = chosen(values, Criterion(energy=0.9), allocation, {"zero": (8, 8), "one": (8, 8)})
    if allocation == "uniform":
        assert found == {"zero": 2, "one": 2}
    else:
        assert found == {"zero": 0, "one": 2}


@pytest.mark.parametrize("allocation", [None, "uniform", *GREEDY])
def test_an_adapter_of_zeros_keeps_nothing(allocation: Allocation | None) -> None:
    assert chosen({"zero": np.zeros(3)}, Criterion(energy=0.9), allocation, {"zero": (8, 8)}) == {
        "zero": 0
    }


@each_seed
@each_greedy
def test_the_order_of_modules_decides_nothing(seed: int, allocation: Allocation) -> None:
    values = spectra(seed)
    turned = dict(reversed(values.items()))
    assert chosen(values, Criterion(rank=2), allocation, UNEQUAL) == chosen(
        turned, Criterion(rank=2), allocation, UNEQUAL
    )


@each_seed
def test_the_relative_score_ignores_the_length_of_a_module(seed: int) -> None:
    values = spectra(seed)
    longer = {name: s * 10**i for i, (name, s) in enumerate(values.items())}
    criterion = Criterion(rank=2)
    assert chosen(values, criterion, "relative") == chosen(longer, criterion, "relative")
