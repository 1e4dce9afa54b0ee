"""Our merges of delta weights against mergekit's own functions, at equal weights."""

import warnings
from types import ModuleType

import numpy as np
import pytest
import torch

from loramerge.algorithms.sce import SceOptions, sce
from loramerge.algorithms.ties import TiesOptions, ties
from loramerge.mergekit import METHODS, WHOLE
from loramerge.registry import method
from tests.entries import apart, delta, updates, weighted

pytestmark = pytest.mark.consumers


def mergekit(name: str) -> ModuleType:
    """One of mergekit's modules, imported with whatever it warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(f"mergekit.{name}", reason="needs mergekit: make consumers")


def tensors(rng: np.random.Generator, count: int = 3) -> tuple[object, list[list[torch.Tensor]]]:
    """Updates, and for each item of the batch their delta weights as mergekit takes them."""
    given = updates(rng, ranks=(4, 6, 3)[:count])
    return given, [[torch.from_numpy(x) for x in weighted(given, item)] for item in range(2)]


def test_a_trimmed_and_elected_merge_is_that_of_mergekit(rng: np.random.Generator) -> None:
    sparse = mergekit("sparsify")
    elect = mergekit("merge_methods.generalized_task_arithmetic").get_mask
    given, items = tensors(rng)
    found = delta(ties(given, TiesOptions(space="dense", density=0.2)))
    for item, xs in enumerate(items):
        thin = [sparse.sparsify(x, 0.2, sparse.SparsificationMethod.magnitude) for x in xs]
        stack = torch.stack(thin)
        mask = elect(stack, method="sum", mask_dtype=stack.dtype)
        theirs = (stack * mask).sum(0) / mask.sum(0).clamp(min=1)
        # 540 of 2700 entries for both, in float64
        assert apart(found[item], theirs.numpy()) < 1e-10


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_sce_is_that_of_mergekit(rng: np.random.Generator, density: float) -> None:
    module = mergekit("merge_methods.sce")
    elect = mergekit("merge_methods.generalized_task_arithmetic").get_mask
    given, items = tensors(rng)
    found = delta(sce(given, SceOptions(space="dense", density=density)))
    for item, xs in enumerate(items):
        stack = torch.stack(xs)
        stack = stack * module.sce_mask(stack, density, stack.dtype)
        weights = module.sce_weight(stack)[:, None, None]
        kept = weights * elect(stack, method="sum", mask_dtype=stack.dtype)
        theirs = (stack * kept).sum(0) / kept.sum(0).clamp(min=1e-6)
        assert apart(found[item], theirs.numpy()) < 1e-10


def test_karcher_is_that_of_mergekit(rng: np.random.Generator) -> None:
    module = mergekit("merge_methods.karcher")
    given, items = tensors(rng)
    found = delta(method("karcher").rule(given, method("karcher").options()))
    for item, xs in enumerate(items):
        theirs = module.karcher_merge_tensors(xs, [1 / 3] * 3, max_iter=200, tol=1e-9)
        # its vectors are compared in float32
        assert apart(found[item], theirs.numpy()) < 1e-5


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_is_that_of_mergekit(rng: np.random.Generator, t: float) -> None:
    module = mergekit("merge_methods.slerp")
    given, items = tensors(rng, count=2)
    found = delta(method("slerp").rule(given, method("slerp").options(t=t)))
    for item, xs in enumerate(items):
        theirs = module.slerp(torch.tensor([t]), *(x[None] for x in xs))[0]
        # t is rounded to float32 on the way
        assert apart(found[item], theirs.numpy()) < 1e-6


def test_every_method_of_mergekit_is_translated_or_refused_with_a_reason() -> None:
    theirs = mergekit("merge_methods.registry")._METHODS
    assert set(theirs) <= {*METHODS, *WHOLE}
