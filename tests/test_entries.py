"""SCE and Consensus Merging, against their algorithms written out in float64, and by their laws."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from msgspec.structs import replace

from loramerge.adapter import LowRank, Updates
from loramerge.algorithms.consensus import ConsensusOptions, consensus
from loramerge.algorithms.sce import SceOptions, sce
from tests import entries
from tests.entries import apart, delta, updates, weighted
from tests.test_ties import single_entries

each_space = pytest.mark.parametrize("space", ["knots", "core", "dense"])
WEIGHTS = (1.0, 0.5, -0.8)


def select_calculate_erase(xs: Sequence[np.ndarray], density: float) -> np.ndarray:
    """SCE (arXiv:2408.07990), one step after the other."""
    variance = np.mean([(x - sum(xs) / len(xs)) ** 2 for x in xs], axis=0)
    mask = entries.trim(variance, density) > 0
    selected = [x * mask for x in xs]
    squares = np.array([np.mean(x**2) for x in selected])
    shares = squares / squares.sum()
    merged = np.zeros_like(xs[0])
    for place in np.ndindex(merged.shape):
        sign = 1 if sum(x[place] for x in selected) >= 0 else -1
        agreeing = [
            (w, x[place]) for w, x in zip(shares, selected, strict=True) if x[place] * sign > 0
        ]
        if agreeing:
            merged[place] = sum(w * x for w, x in agreeing) / sum(w for w, _ in agreeing)
    return merged


def masked_sum(xs: Sequence[np.ndarray], threshold: float, users: int) -> np.ndarray:
    """Consensus Merging (arXiv:2405.07813, section 4): TALL masks, votes, the sum where they do."""
    total = sum(xs)
    masks = [np.abs(x) >= threshold * np.abs(total - x) for x in xs]
    return np.where(sum(mask.astype(int) for mask in masks) >= users, total, 0)


def wanted(
    given: Updates, space: str, rule: Callable[[list[np.ndarray]], np.ndarray]
) -> np.ndarray:
    return np.stack([entries.in_space(space, weighted(given, i), rule) for i in range(2)])


@each_space
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_sce_is_its_algorithm_written_out(
    rng: np.random.Generator, space: str, density: float
) -> None:
    given = updates(rng, m=30, n=20, weights=WEIGHTS)
    found = delta(sce(given, SceOptions(space=space, density=density)))
    assert (
        apart(found, wanted(given, space, lambda xs: select_calculate_erase(xs, density))) < 1e-10
    )


@each_space
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("users", [1, 2, 3])
def test_consensus_is_its_algorithm_written_out(
    rng: np.random.Generator, space: str, threshold: float, users: int
) -> None:
    given = updates(rng, m=30, n=20, weights=WEIGHTS)
    options = ConsensusOptions(space=space, threshold=threshold, users=users)
    written = wanted(given, space, lambda xs: masked_sum(xs, threshold, users))
    assert apart(delta(consensus(given, options)), written) < 1e-10


@each_space
def test_consensus_of_trimmed_updates_trims_first(rng: np.random.Generator, space: str) -> None:
    given = updates(rng, m=30, n=20)
    options = ConsensusOptions(space=space, sparsify="magnitude", density=0.3)

    def rule(xs: list[np.ndarray]) -> np.ndarray:
        return masked_sum([entries.trim(x, 0.3) for x in xs], 0.2, 2)

    assert apart(delta(consensus(given, options)), wanted(given, space, rule)) < 1e-10


@each_space
def test_one_adapter_alone_comes_back(rng: np.random.Generator, space: str) -> None:
    given = updates(rng, ranks=(5,))
    alone = np.stack([weighted(given, item)[0] for item in range(2)])
    assert apart(delta(consensus(given, ConsensusOptions(space=space))), alone) < 1e-10
    assert apart(delta(sce(given, SceOptions(space=space, density=1.0))), alone) < 1e-10


@each_space
def test_of_copies_everything_that_is_selected_is_theirs(
    rng: np.random.Generator, space: str
) -> None:
    one = updates(rng, ranks=(5,))
    copies = replace(one, factors=one.factors * 3, weights=(1.0,) * 3, keys=one.keys * 3)
    alone = delta(one.factors[0])
    assert apart(delta(sce(copies, SceOptions(space=space, density=1.0))), alone) < 1e-10
    assert apart(delta(consensus(copies, ConsensusOptions(space=space))), 3 * alone) < 1e-10


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ((3.0, 1.0), 2.8),  # squares 9 and 1: (9 * 3 + 1 * 1) / 10
        ((3.0, -1.0), 3.0),  # the minority is erased, its weight too
        ((2.0, -2.0), 2.0),  # a sum of 0 elects +
        ((-4.0, 0.0), -4.0),
        ((0.0, 0.0), 0.0),
    ],
)
def test_an_entry_of_sce_by_hand(values: tuple[float, ...], found: float) -> None:
    merged = delta(sce(single_entries(*values), SceOptions(space="dense", density=1.0)))
    assert merged.item() == pytest.approx(found, abs=1e-12)


@pytest.mark.parametrize(
    ("values", "users", "found"),
    [
        ((3.0, 2.0, 1.0), 1, 6.0),
        ((3.0, 2.0, 1.0), 2, 6.0),  # 1 is a fifth of 5: used, and by all
        ((8.0, 0.1, 0.1), 2, 0.0),  # selfish: of use to one
        ((8.0, 0.1, 0.1), 1, 8.2),
        ((5.0, -1.0, 5.0), 3, 0.0),  # 1 is a tenth of 10
        ((5.0, -1.0, 5.0), 2, 9.0),
    ],
)
def test_an_entry_of_consensus_by_hand(values: tuple[float, ...], users: int, found: float) -> None:
    options = ConsensusOptions(space="dense", users=users)
    merged = delta(consensus(single_entries(*values), options))
    assert merged.item() == pytest.approx(found, abs=1e-12)


def test_sce_selects_the_same_number_of_entries_in_every_module(rng: np.random.Generator) -> None:
    given = updates(rng, m=40, n=25)
    merged = delta(sce(given, SceOptions(space="dense", density=0.1)))
    assert (np.abs(merged) > 1e-9).sum((1, 2)).tolist() == [100, 100]


def test_a_module_that_is_lacking_counts_in_the_variance_as_zeros() -> None:
    # Of (2, 2, 0) and (0, 1.5, 0) the first varies more; without the last the second would.
    one = np.ones((1, 1, 1))
    rows = (np.array([[[2.0, 0.0]]]), np.array([[[2.0, 1.5]]]))
    factors = tuple(LowRank(row, one) for row in rows)
    given = Updates(factors, (1.0, 1.0), (1.0, 1.0), present=(True, True, False))
    merged = delta(sce(given, SceOptions(space="dense", density=0.5)))
    assert merged[0, 0] == pytest.approx([2, 0], abs=1e-12)
