"""PEFT's own merge functions on dense delta weights, against our merges in dense space.

PEFT applies them to the factors A and B; here they get what their papers mean, delta weights.
Densities make whole numbers of entries: PEFT rounds down where we round up.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from peft.utils import merge_utils

from loramerge.adapter import Updates
from loramerge.linalg.masks import uniform
from loramerge.registry import method
from tests.entries import apart, delta, updates, weighted

M, N = 40, 25
DENSITIES = (0.2, 0.5, 0.72)
each_density = pytest.mark.parametrize("density", DENSITIES)


def ours(name: str, given: Updates, **values: object) -> np.ndarray:
    found = method(name)
    return delta(found.rule(given, found.options(space="dense", **values)))


def theirs(
    function: Callable[..., torch.Tensor], given: Updates, item: int, *rest: object
) -> np.ndarray:
    """PEFT's function on the unweighted dense updates of one item of the batch."""
    updates = [torch.from_numpy(f.B[item] @ f.A[item]) for f in given.factors]
    weights = torch.tensor(given.weights, dtype=torch.float64)
    return function(updates, weights, *rest).numpy()


def both(
    given: Updates, found: np.ndarray, function: Callable[..., torch.Tensor], *rest: object
) -> float:
    wanted = np.stack([theirs(function, given, item, *rest) for item in range(2)])
    return apart(found, wanted)


@each_density
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_ties_of_equal_weights_is_pefts(
    rng: np.random.Generator, density: float, weight: float
) -> None:
    given = updates(rng, M, N, weights=(weight,) * 3)
    found = ours("ties", given, density=density)
    assert both(given, found, merge_utils.ties, density) < 1e-10


@each_density
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.3, 2.0, -1.5)])
def test_magnitude_pruning_is_pefts(
    rng: np.random.Generator, density: float, weights: Sequence[float]
) -> None:
    given = updates(rng, M, N, weights=weights)
    found = ours("arithmetic", given, sparsify="magnitude", density=density)
    assert both(given, found, merge_utils.magnitude_prune, density) < 1e-10


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.3, 2.0, -1.5)])
def test_a_plain_sum_is_pefts_task_arithmetic(
    rng: np.random.Generator, weights: Sequence[float]
) -> None:
    given = updates(rng, M, N, weights=weights)
    arithmetic = method("arithmetic")
    found = delta(arithmetic.rule(given, arithmetic.options()))
    assert both(given, found, merge_utils.task_arithmetic) < 1e-10


@each_density
@pytest.mark.parametrize(
    ("name", "function", "weights"),
    [
        ("arithmetic", merge_utils.dare_linear, (0.3, 2.0, -1.5)),
        ("ties", merge_utils.dare_ties, (1.0, 1.0, 1.0)),
    ],
)
def test_dare_with_our_masks_is_pefts(
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    density: float,
    name: str,
    function: Callable[..., torch.Tensor],
    weights: Sequence[float],
) -> None:
    given = updates(rng, M, N, weights=weights)
    found = ours(name, given, sparsify="dare", density=density)
    for item in range(2):
        keys = iter([key[item] for key in given.keys])

        def ask(chance: torch.Tensor, keys=keys) -> torch.Tensor:
            drawn = uniform([next(keys)], (0, 0), chance.shape, chance)
            return (drawn < chance).to(chance.dtype)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "bernoulli", ask)
            wanted = theirs(function, given, item, density)
        assert apart(found[item], wanted) < 1e-10


def test_peft_elects_before_it_weighs_and_we_after(rng: np.random.Generator) -> None:
    # documented in ties: a large weight has a large say with us, and none in PEFT's election
    given = updates(rng, M, N, weights=(1.0, 1.0, 10.0))
    found = ours("ties", given, sparsify="none")
    assert both(given, found, merge_utils.ties, 0.999999) > 0.1
    total = np.stack([sum(weighted(given, item)) for item in range(2)])
    assert (np.sign(found) == np.sign(total)).all()
