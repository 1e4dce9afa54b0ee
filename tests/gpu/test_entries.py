"""Element-wise merging on a GPU: NumPy's masks to the bit, NumPy's choices, NumPy's updates."""

from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace

import loramerge
from loramerge.algorithms._options import SparseOptions
from loramerge.algorithms._rules import disjoint_mean, elect_sign, merge_entries
from loramerge.linalg import dense
from loramerge.linalg.masks import uniform
from loramerge.linalg.select import largest
from tests.backends import BACKENDS
from tests.entries import apart, delta, low_rank, updates

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = BACKENDS["cuda"]


def elected(values):
    return disjoint_mean(values, elect_sign(values))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_masks_have_the_bits_of_the_cpu(dtype: type) -> None:
    keys, like = [0, 20231106, 2**32 - 1], np.zeros((3, 1, 1), dtype)
    ours = uniform(keys, (7, 2**17), (300, 1000), like)
    theirs = CUDA.take(uniform(keys, (7, 2**17), (300, 1000), CUDA.put(like)))
    assert theirs.tobytes() == ours.tobytes()


def test_the_largest_are_those_of_the_cpu(rng: np.random.Generator) -> None:
    matrix = np.round(np.abs(rng.standard_normal((3, 500, 400))), 4).astype(np.float32)
    rows = [slice(0, 320), slice(320, 500)]
    count = np.array([1, 40_000, 190_000])
    chosen = []
    for used in (BACKENDS["numpy"], CUDA):
        whole = used.put(matrix)
        sample = used.put(np.ascontiguousarray(matrix[:, ::3, ::3].reshape(3, -1)))
        found = largest(lambda r, w=whole: w[..., r, :], rows, used.put(count), sample)
        chosen.append(used.take(found.chosen(whole, 0)))
    np.testing.assert_array_equal(chosen[1], chosen[0])
    assert chosen[0].sum((1, 2)).tolist() == count.tolist()


@pytest.mark.parametrize("space", ["knots", "core", "dense"])
@pytest.mark.parametrize("sparsify", ["none", "magnitude", "dare", "della", "breadcrumbs"])
def test_a_merge_is_that_of_the_cpu(rng: np.random.Generator, space: str, sparsify: str) -> None:
    # float64, so that no entry changes sides at a threshold by rounding
    given = replace(updates(rng, m=300, n=200, ranks=(8, 6, 8), batch=5), rank=8)
    options = SparseOptions(space=space, sparsify=sparsify)
    put = replace(given, factors=tuple(CUDA.update(f) for f in given.factors))
    theirs = delta(CUDA.back(low_rank(merge_entries(put, options, options.space, elected))))
    assert apart(theirs, delta(merge_entries(given, options, options.space, elected))) < 1e-8


def test_a_large_dense_result_is_cut_as_on_the_cpu(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "SMALL", 100)
    given = updates(rng, m=700, n=500, ranks=(16,) * 4, dtype=np.float32)
    W = delta(merge_entries(given, SparseOptions(), "dense", elected)).astype(np.float32)
    ours = dense.compress(W, 8, 0).truncated(8)
    theirs = CUDA.back(dense.compress(CUDA.put(W), 8, 0).truncated(8))
    assert apart(delta(theirs), delta(ours)) < 1e-5  # float32 products in another order


def test_a_whole_model_is_trimmed_as_on_the_cpu(three: list[Path]) -> None:
    values = {"trim_scope": "model", "compute_dtype": "float64", "save_dtype": "float32"}
    ours, theirs = (
        loramerge.run("ties", three, device=device, **values)[0] for device in ("cpu", "cuda")
    )
    for name in ours.adapter.modules:
        first, second = (found.adapter.read(name) for found in (ours, theirs))
        assert apart(delta(second), delta(first)) < 1e-5  # an entry more or less would show
