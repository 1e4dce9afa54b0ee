"""The laws of `cluster` (LoRA-LEGO): what may and what may not change its result."""

import numpy as np
import pytest
from msgspec.structs import replace

from loramerge.adapter import LowRank, Updates
from loramerge.algorithms.cluster import ClusterOptions, cluster
from tests.updates import dense, gaussian, near

M, N, RANK = 60, 50, 8
GAUGES = ("svd", "balanced", "raw")
each_gauge = pytest.mark.parametrize("gauge", GAUGES)
each_reweight = pytest.mark.parametrize("reweight", ["linf", "l2", "none"])
each_weighting = pytest.mark.parametrize(
    "weights", [(1.0, 1.0, 1.0), (1.0, 0.5, 0.1), (1.0, -0.2, 0.3)]
)


def decaying(rng: np.random.Generator, rank: int = RANK) -> LowRank:
    """A random update in float64 whose relative spectral gaps are well above 1e-3."""
    U = np.linalg.qr(rng.standard_normal((1, M, rank)))[0]
    V = np.linalg.qr(rng.standard_normal((1, N, rank)))[0]
    root = np.sqrt(np.geomspace(4, 1, rank) * rng.uniform(0.97, 1.03, rank))
    return LowRank(root[:, None] * V.mT, U * root)


@pytest.fixture
def updates(rng: np.random.Generator) -> Updates:
    """Three unrelated updates."""
    return of([decaying(rng) for _ in range(3)])


def of(factors: list[LowRank], weights: tuple[float, ...] | None = None) -> Updates:
    weights = weights or (1.0,) * len(factors)
    return Updates(tuple(factors), weights, (1.0,) * len(factors), seed=5)


def changed(updates: Updates, change) -> Updates:
    return replace(updates, factors=tuple(change(update) for update in updates.factors))


def merged(updates: Updates, k: int, **options: object) -> np.ndarray:
    return dense(cluster(updates, ClusterOptions(k=k, **options)))[0]


def apart(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


@each_weighting
@pytest.mark.parametrize("k", [4, 8, 20])
def test_the_svd_gauge_makes_it_independent_of_how_updates_are_factored(
    updates: Updates, rng: np.random.Generator, weights: tuple[float, ...], k: int
) -> None:
    def regauged(update: LowRank) -> LowRank:
        left, right = (np.linalg.qr(rng.standard_normal((RANK, RANK)))[0] for _ in range(2))
        G = left @ np.diag(np.geomspace(1, 100, RANK)) @ right
        return LowRank(np.linalg.inv(G) @ update.A, update.B @ G)

    weighted = replace(updates, weights=weights)
    for _ in range(3):
        again = merged(changed(weighted, regauged), k)
        assert apart(again, merged(weighted, k)) < 1e-4


@each_gauge
@each_weighting
def test_a_rank_turned_round_is_the_same_rank(
    updates: Updates, rng: np.random.Generator, gauge: str, weights: tuple[float, ...]
) -> None:
    # Generic factors: at right angles to all others, a rank-1 term keeps the sign of its file.
    updates = replace(of([gaussian(rng, M, N, RANK) for _ in range(3)]), weights=weights)

    def turned(update: LowRank) -> LowRank:
        sign = rng.choice([-1, 1], RANK).astype(np.float32)
        return LowRank(update.A * sign[:, None], update.B * sign)

    straight = merged(updates, 8, gauge=gauge)
    for _ in range(3):
        # float32
        assert apart(merged(changed(updates, turned), 8, gauge=gauge), straight) < 1e-5


def test_the_balanced_gauge_makes_it_independent_of_how_a_rank_shares_its_length(
    updates: Updates, rng: np.random.Generator
) -> None:
    def shared(update: LowRank) -> LowRank:
        factor = rng.uniform(0.1, 10, RANK)
        return LowRank(update.A * factor[:, None], update.B / factor)

    straight = merged(updates, 8, gauge="balanced")
    assert apart(merged(changed(updates, shared), 8, gauge="balanced"), straight) < 1e-10
    # or the gauge would not be needed
    assert apart(merged(changed(updates, shared), 8, gauge="raw"), straight) > 1e-2


@each_gauge
@each_reweight
@pytest.mark.parametrize("count", [1, 2, 5])
def test_copies_of_an_update_with_its_rank_as_k_come_back_as_that_update(
    rng: np.random.Generator, gauge: str, reweight: str, count: int
) -> None:
    update = decaying(rng)
    found = merged(of([update] * count), RANK, gauge=gauge, reweight=reweight)
    assert apart(found, dense(update)[0]) < 1e-10


@each_gauge
@pytest.mark.parametrize("k", [RANK + 1, 2 * RANK - 1])
def test_with_fewer_distinct_units_than_k_all_are_kept_once(
    rng: np.random.Generator, gauge: str, k: int
) -> None:
    update = decaying(rng)
    found = merged(of([update, update]), k, gauge=gauge)
    assert apart(found, dense(update)[0]) < 1e-10


@pytest.mark.parametrize(
    ("dtype", "k"), [(np.float32, RANK), (np.float64, RANK), (np.float64, RANK + 3)]
)
def test_copies_factored_another_way_are_still_copies(
    rng: np.random.Generator, dtype: type, k: int
) -> None:
    # In float32 they differ by rounding, and are distinct where k asks for more than there are.
    update = decaying(rng)
    G = np.linalg.qr(rng.standard_normal((RANK, RANK)))[0]
    other = LowRank(G.T @ update.A, update.B @ G)
    pair = [LowRank(u.A.astype(dtype), u.B.astype(dtype)) for u in (update, other)]
    assert apart(merged(of(pair), k), dense(update)[0]) < 1e-5


@each_gauge
def test_near_copies_give_nearly_the_update(rng: np.random.Generator, gauge: str) -> None:
    update = decaying(rng)
    found = merged(
        of([update, near(rng, update, 1e-4), near(rng, update, 1e-4)]), RANK, gauge=gauge
    )
    assert apart(found, dense(update)[0]) < 1e-2


@each_gauge
@each_weighting
def test_k_as_large_as_the_sum_of_ranks_or_larger_is_the_weighted_sum(
    updates: Updates, gauge: str, weights: tuple[float, ...]
) -> None:
    total = sum(w * dense(u)[0] for u, w in zip(updates.factors, weights, strict=True))
    for k in (3 * RANK, 3 * RANK + 1, 1000):
        found = merged(replace(updates, weights=weights), k, gauge=gauge)
        assert apart(found, total) < 1e-10


@pytest.mark.parametrize("k", [1, 2, 7, 23, 24])
def test_k_is_the_rank_of_the_result(updates: Updates, k: int) -> None:
    result = cluster(updates, ClusterOptions(k=k))
    assert result.rank == k
    assert np.linalg.matrix_rank(dense(result)[0]) == k


@each_gauge
@pytest.mark.parametrize("k", [3, 12, 20])
def test_an_update_of_zeros_changes_nothing(updates: Updates, gauge: str, k: int) -> None:
    # As stored, the A of an untrained adapter counts like any other.
    trained = 0 if gauge == "raw" else 1
    zero = LowRank(trained * updates.factors[0].A, 0 * updates.factors[0].B)
    factors = (*updates.factors, zero)
    more = Updates(factors, (1.0,) * 4, (1.0,) * 4, seed=5)
    assert apart(merged(more, k, gauge=gauge), merged(updates, k, gauge=gauge)) < 1e-10


@each_gauge
def test_an_adapter_of_weight_zero_changes_nothing(updates: Updates, gauge: str) -> None:
    two = of(list(updates.factors[:2]))
    weighted = replace(updates, weights=(1.0, 1.0, 0.0))
    assert apart(merged(weighted, 8, gauge=gauge), merged(two, 8, gauge=gauge)) < 1e-10


@each_gauge
def test_zero_ranks_that_pad_an_update_change_nothing(updates: Updates, gauge: str) -> None:
    def padded(update: LowRank) -> LowRank:
        A = np.concatenate([update.A, np.zeros((1, 3, N))], -2)
        return LowRank(A, np.concatenate([update.B, np.zeros((1, M, 3))], -1))

    again = merged(changed(updates, padded), 8, gauge=gauge)
    assert apart(again, merged(updates, 8, gauge=gauge)) < 1e-10


@each_gauge
@each_reweight
@pytest.mark.parametrize("factor", [1e-8, 0.5, 1e6])
def test_longer_updates_give_a_result_longer_by_as_much(
    updates: Updates, gauge: str, reweight: str, factor: float
) -> None:
    def longer(update: LowRank) -> LowRank:
        return LowRank(update.A * factor**0.5, update.B * factor**0.5)

    once = merged(updates, 8, gauge=gauge, reweight=reweight)
    again = merged(changed(updates, longer), 8, gauge=gauge, reweight=reweight)
    assert apart(again, factor * once) < 1e-8


def test_opposite_weights_give_the_opposite_result(updates: Updates) -> None:
    there = merged(replace(updates, weights=(1.0, 0.5, 2.0)), 8)
    back = merged(replace(updates, weights=(-1.0, -0.5, -2.0)), 8)
    assert apart(back, -there) < 1e-10


@each_gauge
def test_reweighting_gives_centroids_the_mean_length_of_their_members(
    updates: Updates, gauge: str
) -> None:
    # One cluster: every unit is a member, some turned round, which leaves lengths alone.
    def length(update: LowRank, order: float) -> np.ndarray:
        both = np.concatenate([update.A[0].T, update.B[0]])
        return np.linalg.norm(both, order, axis=0)

    everything = cluster(updates, ClusterOptions(k=1000, gauge=gauge, reweight="none"))
    for reweight, order in (("linf", np.inf), ("l2", 2)):
        found = cluster(updates, ClusterOptions(k=1, gauge=gauge, reweight=reweight))
        expected = length(everything, order).mean()
        assert length(found, order)[0] == pytest.approx(expected, rel=1e-10)


def test_the_seed_and_the_restarts_reach_k_means(updates: Updates) -> None:
    one = [merged(replace(updates, seed=seed), 6, restarts=1) for seed in range(6)]
    assert max(apart(x, one[0]) for x in one) > 1e-3
    assert apart(merged(updates, 6, restarts=1), merged(updates, 6, restarts=1)) == 0
