"""One law for each kernel, the same for both backends."""

import numpy as np
import pytest
import torch

from loramerge.linalg import _numpy, _torch
from loramerge.linalg.kernels import kernels
from tests.backends import BACKENDS

each_backend = pytest.mark.parametrize("name", ["numpy", "torch"])


def test_each_kind_of_array_has_its_own_kernels() -> None:
    assert kernels(np.zeros(1)) is _numpy
    assert kernels(torch.zeros(1)) is _torch


@each_backend
def test_cholesky_factors_what_is_positive_definite_and_says_what_is_not(
    rng: np.random.Generator, name: str
) -> None:
    backend = BACKENDS[name]
    X = rng.standard_normal((3, 20, 6))
    G = X.swapaxes(-1, -2) @ X
    G[1] -= 30 * np.eye(6)
    L, ok = (backend.take(x) for x in kernels(backend.put(G)).cholesky(backend.put(G)))
    assert ok.tolist() == [True, False, True]
    for item in (0, 2):
        np.testing.assert_allclose(L[item] @ L[item].T, G[item], rtol=1e-12, atol=1e-12)
        assert np.array_equal(L[item], np.tril(L[item]))
    assert not L[1].any()


@each_backend
def test_cholesky_takes_any_number_of_batch_dimensions(name: str) -> None:
    backend = BACKENDS[name]
    for batch in ((), (2,), (2, 3)):
        G = backend.put(np.broadcast_to(4 * np.eye(2), (*batch, 2, 2)).copy())
        L, ok = kernels(G).cholesky(G)
        assert tuple(ok.shape) == batch
        assert bool(ok.all())
        assert float(backend.take(L)[..., 0, 0].min()) == 2.0


@each_backend
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_inner_products_are_those_of_columns(
    rng: np.random.Generator, name: str, batch: tuple[int, ...]
) -> None:
    backend = BACKENDS[name]
    X, Y = rng.standard_normal((*batch, 30, 4)), rng.standard_normal((*batch, 30, 5))
    found = backend.take(kernels(backend.put(X)).inner(backend.put(X), backend.put(Y)))
    np.testing.assert_allclose(found, np.einsum("...ij,...ik->...jk", X, Y), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_gaussian_matrix_has_the_same_bits_in_both_backends(dtype: type) -> None:
    model = np.zeros(1, dtype)
    ours = _numpy.gaussian(model, 5, 4, 3)
    theirs = _torch.gaussian(torch.from_numpy(model), 5, 4, 3).numpy()
    assert ours.dtype == theirs.dtype == dtype
    assert np.array_equal(ours, theirs)
    assert not np.array_equal(ours, _numpy.gaussian(model, 5, 4, 4))


@each_backend
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ranks_are_the_places_in_a_stable_order(
    rng: np.random.Generator, name: str, dtype: type
) -> None:
    x = np.abs(rng.standard_normal((2, 3, 50))).round(1).astype(dtype)  # many are equal
    x[0, 1] = 0
    x[0, 2] = np.spacing(dtype(1)) * (np.arange(50) * 7 % 13) + 1  # the last bits tell them apart
    x[1, 0] = np.geomspace(1e-30, 1e30, 50)[::-1]
    backend = BACKENDS[name]
    found = backend.take(kernels(backend.put(x)).ranks(backend.put(x)))
    assert found.dtype == np.int32
    for row, places in zip(x.reshape(-1, 50), found.reshape(-1, 50), strict=True):
        assert np.array_equal(np.argsort(row, kind="stable"), np.argsort(places))


def test_where_an_svd_does_not_converge_that_of_the_transpose_stands_in(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    X = rng.standard_normal((3, 6, 4))
    plain = np.linalg.svd

    def refusing(x: np.ndarray, full_matrices: bool) -> object:
        if any(np.array_equal(item, X[1]) for item in x.reshape(-1, *x.shape[-2:])):
            raise np.linalg.LinAlgError("SVD did not converge")
        return plain(x, full_matrices=full_matrices)

    monkeypatch.setattr(np.linalg, "svd", refusing)
    found = _numpy.svd(X)
    for item in (0, 2):
        for part, alone in zip(found, plain(X[item], full_matrices=False), strict=True):
            assert np.array_equal(part[item], alone)
    U, s, Vh = (part[1] for part in found)
    # Rounding of float64.
    assert np.allclose(s, plain(X[1], compute_uv=False), atol=1e-14)
    assert np.allclose((U * s) @ Vh, X[1], atol=1e-14)
    assert U.shape == (6, 4)
    with pytest.raises(np.linalg.LinAlgError):
        _numpy.svd(np.full((2, 2), np.nan))
