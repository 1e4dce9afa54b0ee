"""k-means on inner products: its laws on every kind of array, and scikit-learn beside it."""

from typing import Any

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans, kmeans_plusplus

import loramerge.linalg.kmeans as module
from loramerge.linalg.kmeans import kmeans, starts
from tests.backends import BACKENDS

each_backend = pytest.mark.parametrize("name", ["numpy", "torch", "strict"])


def inertia_of(points: np.ndarray, labels: np.ndarray) -> float:
    """The sum of squared distances from the mean of each label's points."""
    return sum(
        float(((points[labels == j] - points[labels == j].mean(0)) ** 2).sum())
        for j in np.unique(labels)
    )


def partition(labels: np.ndarray) -> set[frozenset[int]]:
    """Labels without their numbering."""
    return {frozenset(np.flatnonzero(labels == j).tolist()) for j in np.unique(labels)}


def units(rng: np.random.Generator, adapters: int, rank: int) -> np.ndarray:
    """Points as `cluster` sees them: rank-1 terms of related adapters, reduced to a Gram matrix."""
    shared = rng.standard_normal((rank, 300))
    pooled = np.concatenate(
        [shared + 0.7 * rng.standard_normal((rank, 300)) for _ in range(adapters)]
    )
    pooled *= np.tile(np.exp(-0.1 * np.arange(rank)), adapters)[:, None]
    values, vectors = np.linalg.eigh(pooled @ pooled.T)
    return vectors * np.sqrt(np.clip(values, 0, None))


def separated(rng: np.random.Generator, clusters: int, each: int) -> np.ndarray:
    """Points of clusters with one best partition."""
    middles = 20 * rng.standard_normal((clusters, 1, 12))
    return (middles + rng.standard_normal((clusters, each, 12))).reshape(-1, 12)


def gram(points: np.ndarray) -> np.ndarray:
    """The inner products of points [b, p, d], which is all that k-means asks for."""
    return points @ points.swapaxes(-1, -2)


def apart(points: np.ndarray) -> np.ndarray:
    """Their squared distances."""
    return np.stack([cdist(x, x, "sqeuclidean") for x in points])


def run(name: str, points: np.ndarray, k: int, seed: int = 0, restarts: int = 10):
    backend = BACKENDS[name]
    labels, inertia = kmeans(backend.put(gram(points)), k, seed, restarts)
    return backend.take(labels), backend.take(inertia)


@each_backend
@pytest.mark.parametrize("k", [1, 3, 8])
def test_kmeans_states_the_inertia_of_its_labels(
    rng: np.random.Generator, name: str, k: int
) -> None:
    points = rng.standard_normal((2, 20, 4))
    labels, inertia = run(name, points, k)
    assert labels.shape == (2, 20)
    for item in range(2):
        assert len(np.unique(labels[item])) == k
        assert labels[item].min() >= 0
        assert labels[item].max() < k
        assert inertia[item] == pytest.approx(inertia_of(points[item], labels[item]), rel=1e-9)


@each_backend
def test_kmeans_finds_clusters_that_are_there(rng: np.random.Generator, name: str) -> None:
    points = separated(rng, 6, 5)
    labels, _ = run(name, points[None], 6)
    assert partition(labels[0]) == partition(np.repeat(np.arange(6), 5))


@each_backend
def test_a_result_of_kmeans_cannot_be_bettered_by_moving_a_point_to_a_nearer_centre(
    rng: np.random.Generator, name: str
) -> None:
    points = units(rng, 3, 8)
    labels = run(name, points[None], 8)[0][0]
    centres = np.stack([points[labels == j].mean(0) for j in range(8)])
    squares = ((points[:, None] - centres) ** 2).sum(-1)
    assert np.array_equal(squares.argmin(1), labels)


@each_backend
@pytest.mark.parametrize(("adapters", "rank", "k"), [(4, 16, 16), (2, 16, 16), (8, 8, 12)])
def test_kmeans_is_within_1_percent_of_scikit_learn_over_ten_seeds(
    rng: np.random.Generator, name: str, adapters: int, rank: int, k: int
) -> None:
    # One seed scatters by 1 %, ten on one problem by 0.5 %; a batch of six problems by 0.2 %.
    points = np.stack([units(rng, adapters, rank) for _ in range(6)])
    ours = np.mean([run(name, points, k, seed)[1] for seed in range(10)], axis=0)
    theirs = [
        np.mean([KMeans(k, n_init=10, random_state=seed).fit(x).inertia_ for seed in range(10)])
        for x in points
    ]
    assert np.mean(ours / theirs) == pytest.approx(1, abs=0.01)


@each_backend
@pytest.mark.parametrize("k", [3, 8])
def test_labels_are_those_of_scikit_learn(rng: np.random.Generator, name: str, k: int) -> None:
    points = units(rng, 3, 8)
    for seed in range(5):
        model = KMeans(k, n_init=10, random_state=seed).fit(points)
        labels, inertia = run(name, points[None], k, seed)
        assert np.array_equal(labels[0], model.labels_)
        assert inertia[0] == pytest.approx(model.inertia_, rel=1e-12)


# Few enough clusters that no two candidates are as good as each other.
@pytest.mark.parametrize("k", [1, 2, 6])
@each_backend
def test_starts_are_those_scikit_learn_would_find(
    rng: np.random.Generator, name: str, k: int
) -> None:
    points = np.stack([units(rng, 3, 8) for _ in range(2)])
    put, take = BACKENDS[name].put, BACKENDS[name].take
    found = take(starts(put(apart(points)), put(np.ones((2, 24), bool)), k, 3, 5))
    for item in range(2):
        random = np.random.RandomState(3)
        for run in range(5):
            expected = kmeans_plusplus(points[item], k, random_state=random)[1]
            assert np.array_equal(found[item, run], expected)


def test_of_candidates_that_are_as_good_rounding_does_not_choose(
    rng: np.random.Generator,
) -> None:
    # Pairs far from each other: either of a pair covers both.
    middles = 50 * rng.standard_normal((12, 1, 5))
    points = (middles + rng.standard_normal((12, 2, 5))).reshape(1, 24, 5)
    turn = np.linalg.qr(rng.standard_normal((5, 5)))[0]  # changes nothing but rounding
    all_live = np.ones((1, 24), bool)
    found = starts(apart(points), all_live, 12, 0, 50)
    assert np.array_equal(found, starts(apart(points @ turn), all_live, 12, 0, 50))


def test_no_point_is_a_start_twice_and_none_at_the_origin_is_one(rng: np.random.Generator) -> None:
    points = np.zeros((1, 30, 5))
    places = np.sort(rng.permutation(30)[:8])
    points[0, places] = rng.standard_normal((8, 5))
    for run in starts(apart(points), np.any(points != 0, axis=-1), 8, 0, 20)[0]:
        assert sorted(run) == places.tolist()


@each_backend
def test_more_restarts_are_never_worse(rng: np.random.Generator, name: str) -> None:
    points = units(rng, 4, 12)[None]
    few, many = (
        np.mean([run(name, points, 10, seed, n)[1][0] for seed in range(5)]) for n in (1, 20)
    )
    assert many < few


@each_backend
def test_points_at_the_origin_carry_no_weight(rng: np.random.Generator, name: str) -> None:
    points = separated(rng, 4, 5) + 100
    spread = np.zeros((40, 12))
    places = np.sort(rng.permutation(40)[:20])
    spread[places] = points
    alone, inertia = run(name, points[None], 4)
    among, same = run(name, spread[None], 4)
    assert partition(among[0][places]) == partition(alone[0])
    assert same[0] == pytest.approx(inertia[0], rel=1e-9)


@each_backend
@pytest.mark.parametrize("k", [3, 4, 7])
def test_with_no_more_distinct_points_than_clusters_each_is_its_own(
    rng: np.random.Generator, name: str, k: int
) -> None:
    distinct = rng.standard_normal((3, 5))
    points = np.concatenate([distinct, distinct[::-1], np.zeros((1, 5))])
    labels, inertia = run(name, points[None], k)
    assert partition(labels[0][:6]) == {frozenset({0, 5}), frozenset({1, 4}), frozenset({2, 3})}
    assert inertia[0] == 0


@each_backend
def test_points_that_are_all_zero_need_no_cluster(name: str) -> None:
    labels, inertia = run(name, np.zeros((1, 5, 3)), 2)
    assert not labels.any()
    assert inertia[0] == 0


@each_backend
def test_an_item_of_a_batch_is_clustered_as_if_it_were_alone(
    rng: np.random.Generator, name: str
) -> None:
    few = np.tile(rng.standard_normal((3, 24)), (8, 1))
    points = np.stack([units(rng, 3, 8), few, units(rng, 3, 8)])
    together, _ = run(name, points, 6)
    for item in range(3):
        assert np.array_equal(together[item], run(name, points[item : item + 1], 6)[0][0])


@each_backend
def test_kmeans_follows_its_seed(rng: np.random.Generator, name: str) -> None:
    points = rng.standard_normal((1, 40, 10))
    first, same, other = (run(name, points, 8, seed, restarts=1)[0] for seed in (1, 1, 2))
    assert np.array_equal(first, same)
    assert partition(first[0]) != partition(other[0])


@each_backend
def test_empty_clusters_move_to_the_farthest_points(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # Real starts are distinct points, and hardly ever leave a cluster empty.
    def same_point(between: Any, live: Any, k: int, seed: int, restarts: int) -> Any:
        return BACKENDS[name].put(np.zeros((between.shape[0], restarts, k), np.int64))

    monkeypatch.setattr(module, "starts", same_point)
    points = np.array([[[105.0], [106.0], [130.0], [130.5], [170.0]]])
    labels, inertia = run(name, points, 3)
    assert partition(labels[0]) == {frozenset({0, 1}), frozenset({2, 3}), frozenset({4})}
    assert inertia[0] == pytest.approx(0.5 + 0.125)
