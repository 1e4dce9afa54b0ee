"""The leading singular vectors of a whole matrix, against NumPy's SVD in float64."""

import numpy as np
import pytest

from loramerge.adapter import LowRank, Updates
from loramerge.algorithms.squeeze import SqueezeOptions, squeeze
from loramerge.linalg import dense
from loramerge.linalg.dense import compress
from tests.backends import BACKENDS


def flat_spectrum(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    """What a sign election makes of four updates: every rank, no gap anywhere. [2, m, n]"""
    parts = rng.standard_normal((4, 2, m, 16)) @ rng.standard_normal((4, 2, 16, n))
    parts = np.where(np.abs(parts) > 4, parts, 0)
    sign = np.where(parts.sum(0) >= 0, 1, -1)
    return (sign * np.maximum(parts * sign, 0).sum(0)).astype(np.float32)


def least_error(W: np.ndarray, rank: int) -> np.ndarray:
    """The error of the best approximation (Eckart-Young-Mirsky), by NumPy."""
    s = np.linalg.svd(W.astype(np.float64), compute_uv=False)
    return np.sqrt((s[..., rank:] ** 2).sum(-1))


def error(W: np.ndarray, rank: int) -> np.ndarray:
    found = compress(W, rank, seed=0).truncated(rank)
    gap = W.astype(np.float64) - found.B.astype(np.float64) @ found.A.astype(np.float64)
    return np.linalg.norm(gap, axis=(-2, -1))


@pytest.mark.parametrize("shape", [(60, 45), (45, 60), (50, 50), (1, 9), (9, 1)])
def test_a_small_matrix_is_cut_as_well_as_can_be(
    rng: np.random.Generator, shape: tuple[int, int]
) -> None:
    W = flat_spectrum(rng, *shape)
    for rank in (1, min(5, *shape), min(shape)):
        # float32 factors, relative to the whole
        bound = 1e-6 * np.linalg.norm(W, axis=(-2, -1)) + least_error(W, rank)
        assert (error(W, rank) <= bound).all()


def test_the_exact_way_finds_every_singular_value(rng: np.random.Generator) -> None:
    W = flat_spectrum(rng, 60, 45)
    s = np.linalg.svd(W.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(compress(W, None, 0).s, s, rtol=1e-9)


@pytest.mark.parametrize("shape", [(700, 500), (500, 700)])
@pytest.mark.parametrize("rank", [4, 16])
def test_a_large_matrix_is_cut_within_a_thousandth_of_the_best(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], rank: int
) -> None:
    monkeypatch.setattr(dense, "SMALL", 100)
    W = flat_spectrum(rng, *shape)
    assert compress(W, rank, 0).s.shape[-1] < 500  # not the exact way
    assert (error(W, rank) <= 1.001 * least_error(W, rank)).all()


def test_singular_vectors_of_a_large_matrix_are_orthonormal(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "SMALL", 100)
    found = compress(flat_spectrum(rng, 700, 500), 8, 0)
    for side in (found.left @ found.u, (found.vh @ found.right).swapaxes(-1, -2)):
        gram = side[..., :8].swapaxes(-1, -2) @ side[..., :8]
        # float32 throughout
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(8), gram.shape), atol=1e-5)


def test_a_matrix_of_low_rank_comes_back_whole(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    W = rng.standard_normal((1, 700, 6)) @ rng.standard_normal((1, 6, 500))
    for small in (100, 1024):
        monkeypatch.setattr(dense, "SMALL", small)
        # float32 entries and factors
        assert error(W.astype(np.float32), 16) / np.linalg.norm(W) < 1e-6


def test_a_matrix_of_zeros_stays_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    for small in (100, 1024):
        monkeypatch.setattr(dense, "SMALL", small)
        found = compress(np.zeros((1, 300, 200), np.float32), 4, 0).truncated(4)
        assert not (found.B @ found.A).any()
        assert np.isfinite(found.B).all()


def test_an_item_of_a_batch_is_cut_as_it_is_alone(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "SMALL", 100)
    W = flat_spectrum(rng, 700, 500)
    together = compress(W, 8, 3).truncated(8)
    for item in range(2):
        alone = compress(W[item : item + 1], 8, 3).truncated(8)
        assert alone.A.tobytes() == together.A[item].tobytes()
        assert alone.B.tobytes() == together.B[item].tobytes()


@pytest.mark.parametrize("small", [100, 1024])
def test_torch_finds_what_numpy_finds(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    monkeypatch.setattr(dense, "SMALL", small)
    W = flat_spectrum(rng, 700, 500) + np.float32(20)  # and one singular value far above
    torch = BACKENDS["torch"]
    ours = compress(W, 8, 0).truncated(8)
    theirs = torch.back(compress(torch.put(W), 8, 0).truncated(8))
    gap = np.linalg.norm(theirs.B @ theirs.A - ours.B @ ours.A) / np.linalg.norm(ours.B @ ours.A)
    # float32 products in another order; blocks not made orthogonal to those before give 4e-4
    assert gap < 5e-6


def test_squeeze_of_an_update_of_full_rank_is_near_the_best(rng: np.random.Generator) -> None:
    m, n, rank = 1100, 1060, 8
    W = flat_spectrum(rng, m, n)[:1]
    whole = LowRank(A=W, B=np.eye(m, dtype=np.float32)[None])
    updates = Updates((whole,), (1.0,), (1.0,), rank=rank)
    found = squeeze(updates, SqueezeOptions()).truncated(rank)
    gap = np.linalg.norm(W[0] - found.B[0].astype(np.float64) @ found.A[0].astype(np.float64))
    # what the option promises
    assert gap <= 1.001 * least_error(W, rank)[0]
