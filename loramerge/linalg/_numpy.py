"""The kernels on the CPU: NumPy, scikit-learn for k-means."""

import importlib
from functools import cache
from typing import Any

from loramerge._lazy import np, sklearn, sklearn_cluster, threadpoolctl
from loramerge.adapter import Array
from loramerge.linalg.seeding import starts

# Points nearer than this share of the longest one count as the same point.
SAME = 6


def bits(x: Array) -> Array:
    """The bits of float32 numbers, as they lie in memory."""
    return x.view(np.int32)


def cholesky(G: Array) -> tuple[Array, Array]:
    """Lower L with G = L L^T, and ok [*b]; L is zero where G is not positive definite."""
    L = np.zeros_like(G)
    ok = np.zeros(G.shape[:-2], dtype=bool)
    for index in np.ndindex(ok.shape):
        try:
            L[index] = np.linalg.cholesky(G[index])
            ok[index] = True
        except np.linalg.LinAlgError:
            pass  # the caller reads `ok` and takes another road
    return L, ok


def gaussian(model: Array, rows: int, columns: int, seed: int) -> Array:
    """A standard normal matrix of a seed."""
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(model.dtype)


def kmeans(points: Array, k: int, seed: int, restarts: int) -> tuple[Array, Array]:
    """Labels and inertia by scikit-learn from our starts, one batch item after the other."""
    labels = np.zeros(points.shape[:-1], dtype=np.int64)
    inertia = np.zeros(points.shape[:-2])
    for index in np.ndindex(inertia.shape):
        labels[index], inertia[index] = _kmeans(points[index], k, seed, restarts)
    return labels, inertia


def _kmeans(points: Array, k: int, seed: int, restarts: int) -> tuple[Array, Any]:
    labels = np.zeros(len(points), dtype=np.int64)
    live = np.flatnonzero(np.any(points != 0, axis=-1))
    X = points[live]
    longest = np.abs(X).max(initial=0.0) or 1.0
    distinct, member = np.unique(np.round(X / longest, SAME), axis=0, return_inverse=True)
    if len(distinct) <= k:
        labels[live] = member.reshape(-1)
        return labels, 0.0
    runs = iter(starts(X[None], np.ones((1, len(X)), bool), k, seed, restarts)[0])
    # scikit-learn asks for the next start whenever it begins a run.
    model = sklearn_cluster.KMeans(
        k, init=lambda X, k, random_state: X[next(runs)], n_init=restarts
    )
    with (
        sklearn.config_context(assume_finite=True, skip_parameter_validation=True),
        _libraries().limit(limits=1, user_api="openmp"),
    ):
        model.fit(X)
    labels[live] = model.labels_
    return labels, model.inertia_


@cache
def _libraries() -> Any:
    """What scikit-learn computes with. A team of OpenMP threads is slower on problems this small.

    The limit is one of the calling thread alone, so that every fit sets its own.
    """
    importlib.import_module("sklearn.cluster")
    return threadpoolctl.ThreadpoolController()


def tally(x: Array, bins: int) -> Array:
    """How often each whole number occurs."""
    return np.bincount(x, minlength=bins)
