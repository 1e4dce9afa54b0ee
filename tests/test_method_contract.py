"""What every registered method keeps to. The suite grows by itself with every file that is one."""

import os
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

import loramerge
from loramerge.adapter import LowRank, Updates
from loramerge.registry import methods
from tests.backends import lend_kernels_to_strict
from tests.entries import low_rank
from tests.updates import dense, gaussian
from tests.variants import (
    BATCH,
    M,
    N,
    Variant,
    delta,
    each_merge,
    each_method,
    each_variant,
    given,
    surveyed,
    taken,
    three_related,
)

# A law holds for every method and choice of options but these, for the reason given.
NOT_GAUGE_INVARIANT = {
    ("cluster", "gauge=balanced"): "rank-1 terms as trained, by definition",
    ("cluster", "gauge=raw"): "rank-1 terms as stored, by definition",
}
ORDER_MATTERS = {
    "ema": "the last checkpoint is the latest",
    "project": "what is left is the first's",
}


@pytest.fixture
def updates(rng: np.random.Generator) -> Updates:
    return three_related(rng)


@each_variant
def test_a_method_never_modifies_an_input(variant: Variant, updates: Updates) -> None:
    own = given(variant, updates)
    for update in own.factors:
        update.A.flags.writeable = update.B.flags.writeable = False
    before = [(u.A.tobytes(), u.B.tobytes()) for u in own.factors]
    variant.method.rule(own, variant.options)
    assert [(u.A.tobytes(), u.B.tobytes()) for u in own.factors] == before


@each_variant
def test_a_method_gives_the_same_bytes_again(variant: Variant, updates: Updates) -> None:
    own = given(variant, updates)
    first, second = (low_rank(variant.method.rule(own, variant.options)) for _ in range(2))
    assert first.A.tobytes() == second.A.tobytes()
    assert first.B.tobytes() == second.B.tobytes()


@each_variant
def test_a_result_has_the_shape_of_its_inputs_and_finite_floats(
    variant: Variant, updates: Updates
) -> None:
    own = given(variant, updates)
    result = low_rank(variant.method.rule(own, variant.options))
    assert result.A.shape == (BATCH, result.rank, N)
    assert result.B.shape == (BATCH, M, result.rank)
    assert result.rank <= min(M, N)
    for x in (result.A, result.B):
        assert x.dtype in (np.float32, np.float64)
        assert np.isfinite(x).all()


@each_variant
@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_a_batch_gives_what_its_modules_give_one_by_one(
    variant: Variant, updates: Updates, backend: str
) -> None:
    own = surveyed(variant, given(variant, updates))
    together = delta(variant, own, backend)
    for item in range(BATCH):
        alone = delta(variant, only(own, item), backend)
        if backend == "numpy":
            assert np.array_equal(together[item : item + 1], alone)
        else:  # float32 factors are multiplied in another order
            assert apart(together[item : item + 1], alone) <= 1e-6


def apart(x: np.ndarray, y: np.ndarray) -> float:
    """The largest relative distance of two batches of delta weights.

    The updates here are of length 10. What `project` leaves of them is rounding, as they span
    nearly one space, and is none to be relative to.
    """
    gaps = np.linalg.norm(x - y, axis=(-2, -1)) / np.clip(np.linalg.norm(y, axis=(-2, -1)), 1, None)
    return float(gaps.max())


def only(updates: Updates, item: int) -> Updates:
    """One item of the batch."""
    one = slice(item, item + 1)
    return replace(
        updates,
        factors=tuple(LowRank(u.A[one], u.B[one]) for u in updates.factors),
        keys=tuple(row[one] for row in updates.keys),
        names=updates.names[one],
    )


@each_merge
def test_the_order_of_adapters_decides_nothing(variant: Variant, updates: Updates) -> None:
    straight = delta(variant, given(variant, updates))
    first, *others = range(taken(variant))
    turned = ((*others, first), (*reversed(others), first))
    gaps = [apart(delta(variant, given(variant, updates, places)), straight) for places in turned]
    if variant.method.name in ORDER_MATTERS:
        assert max(gaps) > 1e-2  # or it need not be excepted
    else:
        assert max(gaps) <= 1e-5


@each_merge
def test_weights_all_doubled_and_turned_round_do_so_to_the_result(
    variant: Variant, updates: Updates
) -> None:
    own = given(variant, updates)
    turned = replace(own, weights=tuple(-2 * weight for weight in own.weights))
    # powers of two: what is left is rounding that depends on a sign
    assert apart(delta(variant, turned), -2 * delta(variant, own)) <= 1e-6


@each_merge
def test_a_module_that_an_adapter_lacks_is_an_update_of_zero(
    variant: Variant, updates: Updates
) -> None:
    own = given(variant, updates)
    nothing = LowRank(*(x * np.float32(0) for x in (own.factors[1].A, own.factors[1].B)))
    zero = replace(own, factors=(own.factors[0], nothing, *own.factors[2:]))
    present = tuple(place != 1 for place in range(len(own.factors)))
    places = [place for place, there in enumerate(present) if there]
    lacking = replace(given(variant, own, places), present=present)
    # float32 factors are multiplied in another order
    assert apart(delta(variant, lacking), delta(variant, zero)) <= 1e-5


@each_variant
@pytest.mark.parametrize("condition", [1.0, 100.0])
def test_how_a_file_factors_its_update_decides_nothing(
    variant: Variant, updates: Updates, rng: np.random.Generator, condition: float
) -> None:
    own = given(variant, updates)
    changed = replace(own, factors=tuple(regauged(u, rng, condition) for u in own.factors))
    gap = apart(delta(variant, changed), delta(variant, own))
    if (variant.method.name, variant.label) in NOT_GAUGE_INVARIANT:
        assert gap > 1e-2  # or it need not be excepted
    else:
        assert gap < 1e-4


def regauged(update: LowRank, rng: np.random.Generator, condition: float) -> LowRank:
    """(G^-1 A, B G) for a random G of this condition number."""
    r = update.rank
    left, right = (np.linalg.qr(rng.standard_normal((r, r)))[0] for _ in range(2))
    G = left @ np.diag(np.geomspace(1, condition, r)) @ right
    A, B = np.linalg.inv(G) @ update.A.astype(float), update.B.astype(float) @ G
    return LowRank(A.astype(np.float32), B.astype(np.float32))


@each_variant
@pytest.mark.parametrize("backend", ["torch", "strict"])
def test_other_arrays_give_the_delta_weights_of_numpy(
    variant: Variant, updates: Updates, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lend_kernels_to_strict(monkeypatch)
    own = given(variant, updates)
    # float32 factors are multiplied in another order
    assert apart(delta(variant, own, backend), delta(variant, own)) <= 1e-6


@each_variant
def test_updates_that_are_zero_stay_zero(variant: Variant, updates: Updates) -> None:
    own = given(variant, updates)
    zero = tuple(LowRank(u.A, u.B * np.float32(0)) for u in own.factors)
    result = low_rank(variant.method.rule(replace(own, factors=zero), variant.options))
    assert np.isfinite(result.A).all()
    assert not dense(result).any()


@each_variant
@pytest.mark.parametrize(("m", "n"), [(1, 7), (7, 1), (1, 1), (3, 2)])
def test_modules_smaller_than_the_rank_are_taken(
    variant: Variant, updates: Updates, rng: np.random.Generator, m: int, n: int
) -> None:
    own = given(variant, updates)
    small = tuple(gaussian(rng, m, n, u.rank, batch=BATCH) for u in own.factors)
    result = low_rank(variant.method.rule(replace(own, factors=small), variant.options))
    assert dense(result).shape == (BATCH, m, n)
    assert np.isfinite(dense(result)).all()


@each_method
def test_threads_do_not_change_a_byte_of_the_file(
    name: str, three: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = three[: methods()[name].inputs] if methods()[name].takes == "many" else three[:1]
    files = []
    for threads in (1, 8):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=threads: set(range(n)))
        # A rank that cuts; one that pads where nothing else is taken.
        result, _ = loramerge.run(name, inputs, rank=8 if name == "pad" else 3)
        files.append(result.adapter.source.path.read_bytes())
    assert files[0] == files[1]
