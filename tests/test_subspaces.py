"""Iso, STAR, WUDI and Compress-then-Merge against their papers written out, dense and float64."""

import numpy as np
import pytest
from msgspec.structs import replace

from loramerge.algorithms.ctm import CtmOptions, ctm
from loramerge.algorithms.iso import IsoOptions, iso
from loramerge.algorithms.star import StarOptions, star
from loramerge.algorithms.wudi import WudiOptions, wudi
from tests import entries
from tests.entries import apart, delta, updates, weighted

Matrix = np.ndarray
WEIGHTS = (1.0, 0.5, -0.8)


def svd(dW: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    return np.linalg.svd(dW, full_matrices=False)


def test_iso_c_makes_the_numerical_rank_of_the_sum_flat(rng: np.random.Generator) -> None:
    given = updates(rng, weights=WEIGHTS)
    found = delta(iso(given, IsoOptions()))
    for item in range(2):
        U, s, Vh = svd(np.sum(weighted(given, item), axis=0))
        wanted = s[:13].mean() * U[:, :13] @ Vh[:13]
        assert apart(found[item], wanted) < 1e-9
        flat = np.linalg.svd(found[item], compute_uv=False)
        assert flat[:13] == pytest.approx(s[:13].mean())
        assert flat[13:].max() < 1e-9


def test_iso_cts_adds_directions_of_each_task(rng: np.random.Generator) -> None:
    given = updates(rng, m=60, n=50, ranks=(5, 5, 5), weights=WEIGHTS)
    found = delta(iso(given, IsoOptions(directions="task")))
    for item in range(2):
        deltas = weighted(given, item)
        U, s, Vh = svd(np.sum(deltas, axis=0))
        us, ss, vs = [U[:, :12]], [s[:12]], [Vh[:12].T]
        for dW in deltas:
            P, d, Qh = svd(dW - U[:, :12] @ U[:, :12].T @ dW)
            us, ss, vs = [*us, P[:, :1]], [*ss, d[:1]], [*vs, Qh[:1].T]
        U, V = whitened(np.concatenate(us, 1)), whitened(np.concatenate(vs, 1))
        assert apart(found[item], np.concatenate(ss).mean() * U @ V.T) < 1e-9


def whitened(X: Matrix) -> Matrix:
    """P Q^T, damped as in tsv: of 15 vectors in 15 dimensions some are nearly dependent."""
    P, d, Qh = svd(X)
    return (P * np.minimum(d / 0.3, 1)) @ Qh


def test_star_cuts_by_nuclear_norm_and_restores_it(rng: np.random.Generator) -> None:
    given = updates(rng, weights=WEIGHTS)
    found = delta(star(given, StarOptions(keep=0.6)))
    for item in range(2):
        wanted = np.zeros_like(found[item])
        for dW in weighted(given, item):
            U, s, Vh = svd(dW)
            k = int(np.searchsorted(np.cumsum(s), 0.6 * s.sum()) + 1)
            wanted += (U[:, :k] * s[:k] * s.sum() / s[:k].sum()) @ Vh[:k] / 3
        assert apart(found[item], wanted) < 1e-9


@pytest.mark.parametrize("ridge", [0.1, 1e-3])
def test_wudi_solves_its_normal_equations(rng: np.random.Generator, ridge: float) -> None:
    given = updates(rng, weights=WEIGHTS)
    result = wudi(given, WudiOptions(ridge=ridge))
    found = delta(result)
    for item in range(2):
        deltas = weighted(given, item)
        grams = [dW.T @ dW / np.linalg.norm(dW) ** 2 for dW in deltas]
        H = np.sum(grams, axis=0)
        H += ridge * np.linalg.eigvalsh(H)[-1] * np.eye(len(H))
        crossed = np.sum([dW @ G for dW, G in zip(deltas, grams, strict=True)], axis=0)
        assert apart(found[item], np.linalg.solve(H, crossed.T).T) < 1e-9
        inputs = np.linalg.svd(np.concatenate(deltas))[2][:13]  # the rows of all, of rank 4 + 6 + 3
        condition = float(result.condition[item])
        assert condition == pytest.approx(np.linalg.cond(inputs @ H @ inputs.T), rel=1e-6)


def subspace(deltas: list[Matrix], rank: int, beta: float, rounds: int) -> tuple[Matrix, Matrix]:
    norms = [np.linalg.norm(dW) for dW in deltas]
    lengths = [beta * norm + (1 - beta) * np.mean(norms) for norm in norms]
    X = [dW * k / norm for dW, k, norm in zip(deltas, lengths, norms, strict=True)]
    V = np.linalg.svd(np.concatenate(X, 0))[2][:rank].T
    U = np.linalg.svd(np.concatenate([x @ V for x in X], 1))[0][:, :rank]
    for _ in range(rounds):
        V = np.linalg.svd(np.concatenate([x.T @ U for x in X], 1))[0][:, :rank]
        U = np.linalg.svd(np.concatenate([x @ V for x in X], 1))[0][:, :rank]
    return U, V


@pytest.mark.parametrize("rule", ["sum", "ties"])
@pytest.mark.parametrize("sparsify", ["none", "magnitude", "dare", "della", "breadcrumbs"])
def test_ctm_merges_in_the_subspace_that_holds_the_updates_best(
    rng: np.random.Generator, rule: str, sparsify: str
) -> None:
    given = replace(updates(rng, m=30, n=25, weights=WEIGHTS), rank=5)
    found = delta(ctm(given, CtmOptions(rule=rule, sparsify=sparsify)))
    for item in range(2):
        deltas = weighted(given, item)
        U, V = subspace(deltas, 5, 0.25, 10)
        inside = [
            thinned(U.T @ dW @ V, sparsify, given.keys[t][item]) for t, dW in enumerate(deltas)
        ]
        merged = entries.elect_and_mean(inside) if rule == "ties" else np.sum(inside, axis=0)
        assert apart(found[item], U @ merged @ V.T) < 1e-7


def thinned(x: Matrix, sparsify: str, key: int) -> Matrix:
    """What a sparsifier leaves of a matrix at density 0.25, with its defaults."""
    return {
        "none": lambda: x,
        "magnitude": lambda: entries.trim(x, 0.25),
        "dare": lambda: entries.dare(x, 0.25, key),
        "della": lambda: entries.della(x, 0.25, 0.1, key),
        "breadcrumbs": lambda: entries.breadcrumbs(x, 0.25, 0.01),
    }[sparsify]()


def test_ctm_loses_nothing_where_the_rank_holds_all(rng: np.random.Generator) -> None:
    given = replace(updates(rng, weights=WEIGHTS), rank=13)
    found = delta(ctm(given, CtmOptions(rule="sum", sparsify="none")))
    for item in range(2):
        assert apart(found[item], np.sum(weighted(given, item), axis=0)) < 1e-9
