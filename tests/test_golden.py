"""Each method against a transcription of its formulas: float64, dense, explicit loops, no tricks.

What is transcribed here is the definition, not the code: no Gram matrices, no factors of sums.
"""

from typing import Any

import numpy as np
import pytest
from sklearn.cluster import KMeans

import loramerge.algorithms.cluster as module
from loramerge.adapter import LowRank, Updates
from loramerge.algorithms.cluster import ClusterOptions, cluster, output_reweighting
from loramerge.linalg.spectrum import Spectrum, decompose
from loramerge.registry import method
from tests.updates import dense, gaussian, near

M, N = 60, 50
RANKS = (6, 4, 8)
each_weighting = pytest.mark.parametrize(
    "weights", [(1.0, 1.0, 1.0), (0.7, 1.3, 0.4), (1.0, -0.5, 2.0), (-1.0, -1.0, -1.0)]
)
each_seed = pytest.mark.parametrize("seed", range(3))


def three(seed: int, weights: tuple[float, ...], ranks: tuple[int, ...] = RANKS) -> Updates:
    """Three random updates that share a part, each folded with its own scaling."""
    rng = np.random.default_rng(seed)
    shared = gaussian(rng, M, N, max(ranks))
    scalings = (2.0, 0.5, 1.25)[: len(ranks)]
    factors = []
    for rank, scaling in zip(ranks, scalings, strict=True):
        own = gaussian(rng, M, N, rank)
        A, B = own.A + shared.A[:, :rank], own.B + shared.B[:, :, :rank]
        # Ranks of unequal length, so that none of the spectra is nearly flat.
        B = B * np.float32(scaling) * np.geomspace(1, 0.3, rank, dtype=np.float32)
        factors.append(LowRank(A, B))
    return Updates(tuple(factors), tuple(weights), scalings, rank=None, seed=seed)


def delta(result: LowRank | Spectrum) -> np.ndarray:
    if isinstance(result, Spectrum):
        result = result.truncated(result.s.shape[-1])
    return dense(result)[0]


def close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    return bool(np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected))


# Task arithmetic: dW = sum_t w_t dW_t.


@each_seed
@each_weighting
def test_arithmetic_is_the_weighted_sum(seed: int, weights: tuple[float, ...]) -> None:
    updates = three(seed, weights)
    expected = np.zeros((M, N))
    for update, weight in zip(updates.factors, weights, strict=True):
        for i in range(update.rank):
            b, a = update.B[0, :, i].astype(float), update.A[0, i].astype(float)
            expected += weight * np.outer(b, a)
    found = delta(method("arithmetic").rule(updates, method("arithmetic").options()))
    # Weights are multiplied into float32 factors.
    assert close(found, expected, 1e-6)


# Squeeze: the k largest singular triplets of the dense update.


@each_seed
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_squeeze_is_the_truncated_svd_of_the_dense_update(seed: int, rank: int) -> None:
    update = three(seed, (1.0, 1.0, 1.0)).factors[2]
    U, S, Vh = np.linalg.svd(dense(update)[0])
    expected = np.zeros((M, N))
    for i in range(rank):
        expected += S[i] * np.outer(U[:, i], Vh[i])
    squeeze = method("squeeze")
    found = squeeze.rule(Updates((update,), (1.0,), (1.0,), rank=rank), squeeze.options())
    assert isinstance(found, LowRank)  # the update itself, which the engine cuts
    # float32 factors, and a Gram matrix whose pivot is above 0.03
    assert close(dense(decompose(found).truncated(rank))[0], expected, 1e-5)


# LoRA-LEGO (arXiv:2409.16167) as the house defines it.


def in_gauge(update: LowRank, scaling: float, gauge: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """The rank-1 terms (a, b) of a dense update or of its factors as stored."""
    if gauge == "svd":
        U, S, Vh = np.linalg.svd(dense(update)[0])
        pairs = [(np.sqrt(S[i]) * Vh[i], np.sqrt(S[i]) * U[:, i]) for i in range(update.rank)]
        # A singular vector has no sign of its own: the largest entry of b is positive.
        signs = [np.sign(b[np.abs(b).argmax()]) for _, b in pairs]
        return [(s * a, s * b) for s, (a, b) in zip(signs, pairs, strict=True)]
    A = update.A[0].astype(float)
    B = update.B[0].astype(float) / scaling  # as the file stores it
    pairs = []
    for i in range(update.rank):
        a, b = np.sqrt(scaling) * A[i], np.sqrt(scaling) * B[:, i]
        if gauge == "balanced":
            c = np.sqrt(np.linalg.norm(b) / np.linalg.norm(a))
            a, b = c * a, b / c
        pairs.append((a, b))
    return pairs


def align(units: list[np.ndarray]) -> list[np.ndarray]:
    """Flip each, in order of decreasing energy, to agree with the nearest of those before it."""
    found: list[np.ndarray] = list(units)
    before: list[np.ndarray] = []
    for i in sorted(range(len(units)), key=lambda i: -float(units[i] @ units[i])):
        x = units[i]
        cosines = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in before]
        # At right angles to all (as the terms of one SVD are) there is nothing to agree with.
        if cosines and max(cosines, key=abs) < -1e-3:
            x = -x
        before.append(x)
        found[i] = x
    return found


def units_of(updates: Updates, gauge: str) -> list[np.ndarray]:
    """The minimal semantic units x = (a, b) of all adapters, weighted and aligned in sign."""
    units = []
    for update, weight, scaling in zip(
        updates.factors, updates.weights, updates.scalings, strict=True
    ):
        for a, b in in_gauge(update, scaling, gauge):
            root = np.sqrt(abs(weight))
            units.append(np.concatenate([root * a, np.sign(weight) * root * b]))
    return align(units)


def lego(units: list[np.ndarray], labels: np.ndarray, reweight: str) -> np.ndarray:
    """The merged delta weight of clustered units, without output reweighting."""
    merged = np.zeros((M, N))
    for number in np.unique(labels):
        members = [x for x, label in zip(units, labels, strict=True) if label == number]
        centroid = sum(members) / len(members)
        members = [-x if x @ centroid < 0 else x for x in members]
        centroid = sum(members) / len(members)
        if reweight != "none":
            order = np.inf if reweight == "linf" else 2
            wanted = np.mean([np.linalg.norm(x, order) for x in members])
            centroid = centroid * wanted / np.linalg.norm(centroid, order)
        merged += np.outer(centroid[N:], centroid[:N])
    return merged


def inertia(units: list[np.ndarray], labels: np.ndarray) -> float:
    X = np.array(units)
    return sum(((X[labels == j] - X[labels == j].mean(0)) ** 2).sum() for j in np.unique(labels))


@pytest.fixture
def clusterings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[np.ndarray, np.ndarray]]:
    """Labels and inertia of every clustering that is made."""
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def spy(*arguments: Any) -> tuple[np.ndarray, np.ndarray]:
        seen.append(kmeans(*arguments))
        return seen[-1]

    kmeans = module.kmeans
    monkeypatch.setattr(module, "kmeans", spy)
    return seen


def ours(updates: Updates, k: int, **options: str) -> np.ndarray:
    return delta(cluster(updates, ClusterOptions(k=k, **options)))


@each_seed
@each_weighting
@pytest.mark.parametrize("gauge", ["svd", "balanced", "raw"])
@pytest.mark.parametrize("reweight", ["linf", "l2", "none"])
@pytest.mark.parametrize("k", [1, 8, 17])
def test_cluster_is_lora_lego_as_defined(
    seed: int,
    weights: tuple[float, ...],
    gauge: str,
    reweight: str,
    k: int,
    clusterings: list[tuple[np.ndarray, np.ndarray]],
) -> None:
    updates = three(seed, weights)
    found = ours(updates, k, gauge=gauge, reweight=reweight)
    [[[labels], [stated]]] = clusterings
    units = units_of(updates, gauge)
    # Random updates have many clusterings that are nearly as good, and ten starts find one of the
    # best. So ours is judged by its inertia on the full vectors, and the rest given its labels.
    model = KMeans(k, n_init=10, random_state=seed).fit(np.array(units))
    assert len(np.unique(labels)) == k
    assert inertia(units, labels) <= 1.05 * model.inertia_
    # A float32 Gram matrix: 1e-7 of squared lengths ten times the inertia.
    assert inertia(units, labels) == pytest.approx(stated, rel=1e-5)
    # float32 singular vectors; the relative gaps of these spectra are above 1e-2
    assert close(found, lego(units, labels, reweight), 1e-4)


@each_seed
@pytest.mark.parametrize("gauge", ["svd", "balanced", "raw"])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.7, 1.3, 0.4), (-1.0, -2.0, -1.0)])
def test_where_clusters_are_clear_it_is_lora_lego_from_end_to_end(
    seed: int, weights: tuple[float, ...], gauge: str
) -> None:
    first = three(seed, weights).factors[2]
    rng = np.random.default_rng(seed)
    factors = tuple(
        LowRank(*(x + 0.01 * rng.standard_normal(x.shape, np.float32) for x in (first.A, first.B)))
        for _ in weights
    )
    updates = Updates(factors, weights, (1.25,) * 3, seed=seed)
    units = units_of(updates, gauge)
    labels = KMeans(8, n_init=10, random_state=seed).fit(np.array(units)).labels_
    assert sorted(np.bincount(labels)) == [3] * 8
    assert close(ours(updates, 8, gauge=gauge), lego(units, labels, "linf"), 1e-4)


@each_seed
@pytest.mark.parametrize("gauge", ["svd", "balanced", "raw"])
@pytest.mark.parametrize("reweight", ["linf", "l2", "none"])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (0.5, 0.5, -0.5, -2.0)])
@pytest.mark.parametrize("k", [3, 9, 16, 17, 21])
def test_repeated_and_nearly_repeated_units_are_clustered_like_any(
    seed: int,
    gauge: str,
    reweight: str,
    weights: tuple[float, ...],
    k: int,
    clusterings: list[tuple[np.ndarray, np.ndarray]],
) -> None:
    # 22 units: six twice over, six 1e-3 beside them, four others. 16 of them are distinct.
    first, other = three(seed, (1.0, 1.0)).factors[:2]
    beside = near(np.random.default_rng(seed), first, 1e-3)
    factors = (first, first, beside, other)
    updates = Updates(factors, weights, (2.0, 2.0, 2.0, 0.5), seed=seed)
    found = ours(updates, k, gauge=gauge, reweight=reweight)
    [[[labels], _]] = clusterings
    assert np.array_equal(labels[:6], labels[6:12])
    assert len(np.unique(labels)) == min(k, 16)
    # float32 singular vectors, as above.
    assert close(found, lego(units_of(updates, gauge), labels, reweight), 1e-4)


@each_seed
@each_weighting
@pytest.mark.parametrize("gauge", ["svd", "balanced", "raw"])
@pytest.mark.parametrize("reweight", ["linf", "l2", "none"])
def test_as_many_clusters_as_units_give_the_weighted_sum(
    seed: int, weights: tuple[float, ...], gauge: str, reweight: str
) -> None:
    updates = three(seed, weights)
    total = sum(w * dense(u)[0] for u, w in zip(updates.factors, weights, strict=True))
    found = ours(updates, sum(RANKS), gauge=gauge, reweight=reweight)
    # Exact but for the rounding of float32 factors, through the svd gauge twice.
    assert close(found, total, 1e-5)


@each_seed
@pytest.mark.parametrize("count", [2, 3])
def test_with_output_reweighting_and_equal_ranks_it_is_that_divided_by_root_t(
    seed: int, count: int
) -> None:
    updates = three(seed, (1.0, -0.5, 2.0)[:count], ranks=(4, 4, 4)[:count])
    options = ClusterOptions(k=4 * count)
    total = sum(w * dense(u)[0] for u, w in zip(updates.factors, updates.weights, strict=True))
    found = output_reweighting(updates, options) * delta(cluster(updates, options))
    assert close(found, total / np.sqrt(count), 1e-5)


@pytest.mark.parametrize(("ranks", "k"), [((4, 4), 4), ((4, 8, 3), 5), ((2,), 1), ((4, 4), 99)])
def test_output_reweighting_is_the_root_of_mean_rank_over_k(ranks: tuple[int, ...], k: int) -> None:
    updates = three(0, (1.0,) * len(ranks), ranks)
    clusters = min(k, sum(ranks))
    expected = np.sqrt(np.mean(ranks) / clusters)
    assert output_reweighting(updates, ClusterOptions(k=k)) == pytest.approx(expected, rel=1e-12)
