"""TIES, against its algorithm written out in float64, and by its laws."""

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

import loramerge
from loramerge.adapter import LowRank, Updates
from loramerge.algorithms.ties import TiesOptions, ties
from loramerge.errors import GateError
from loramerge.linalg import dense
from loramerge.registry import method
from tests import entries
from tests.entries import apart, delta, updates, weighted

SPACES = ("knots", "core", "dense")
each_space = pytest.mark.parametrize("space", SPACES)
each_sparsifier = pytest.mark.parametrize(
    "sparsify", ["none", "magnitude", "dare", "della", "breadcrumbs"]
)


def thin(x: np.ndarray, sparsify: str, key: int) -> np.ndarray:
    """A sparsifier at ties' defaults."""
    return {
        "none": lambda: x,
        "magnitude": lambda: entries.trim(x, 0.2),
        "dare": lambda: entries.dare(x, 0.2, key),
        "della": lambda: entries.della(x, 0.2, 0.1, key),
        "breadcrumbs": lambda: entries.breadcrumbs(x, 0.2, 0.01),
    }[sparsify]()


@each_space
@each_sparsifier
def test_ties_is_its_algorithm_written_out(
    rng: np.random.Generator, space: str, sparsify: str
) -> None:
    given = updates(rng, m=30, n=20, weights=(1.0, 0.5, -0.8))
    found = delta(ties(given, TiesOptions(space=space, sparsify=sparsify)))
    for item in range(2):
        keys = [key[item] for key in given.keys]

        def merge(xs: list[np.ndarray], keys: list[int] = keys) -> np.ndarray:
            thinned = [thin(x, sparsify, key) for x, key in zip(xs, keys, strict=True)]
            return entries.elect_and_mean(thinned)

        wanted = entries.in_space(space, weighted(given, item), merge)
        assert apart(found[item], wanted) < 1e-10


@pytest.mark.parametrize("space", ["knots", "core"])
@each_sparsifier
def test_axes_that_are_none_take_no_part(
    rng: np.random.Generator, space: str, sparsify: str
) -> None:
    given = updates(rng, m=30, n=20, ranks=(4, 6, 3))
    copies = replace(given, factors=(*given.factors[:2], given.factors[0]))
    found = delta(ties(copies, TiesOptions(space=space, sparsify=sparsify)))
    for item in range(2):
        keys = [key[item] for key in given.keys]

        def merge(xs: list[np.ndarray], keys: list[int] = keys) -> np.ndarray:
            assert xs[0].shape[0] == 10  # of 14
            thinned = [thin(x, sparsify, key) for x, key in zip(xs, keys, strict=True)]
            return entries.elect_and_mean(thinned)

        wanted = entries.in_space(space, weighted(copies, item), merge)
        assert apart(found[item], wanted) < 1e-9


@each_space
def test_float32_files_give_what_float64_gives(rng: np.random.Generator, space: str) -> None:
    given = updates(rng, m=80, n=70, dtype=np.float32)
    double = replace(
        given, factors=tuple(LowRank(f.A.astype(float), f.B.astype(float)) for f in given.factors)
    )
    options = TiesOptions(space=space)
    # float32 coordinates; an entry that changes sides at a threshold would show as 1e-3
    assert apart(delta(ties(given, options)), delta(ties(double, options))) < 1e-5


@each_space
@each_sparsifier
def test_one_adapter_of_density_one_comes_back(
    rng: np.random.Generator, space: str, sparsify: str
) -> None:
    given = updates(rng, ranks=(5,), dtype=np.float32)
    values = {} if sparsify == "none" else {"density": 1.0}
    if sparsify == "breadcrumbs":
        values["gamma"] = 0.0
    options = TiesOptions(space=space, sparsify=sparsify, **values)
    wanted = np.stack([weighted(given, item)[0] for item in range(2)])
    assert apart(delta(ties(given, options)), wanted) < 1e-5  # float32


@each_space
@pytest.mark.parametrize("density", [0.2, 1.0])
def test_copies_of_one_adapter_are_that_adapter_alone(
    rng: np.random.Generator, space: str, density: float
) -> None:
    one = updates(rng, ranks=(5,))
    options = TiesOptions(space=space, density=density)
    copies = replace(one, factors=one.factors * 3, weights=(1.0,) * 3, keys=one.keys * 3)
    assert apart(delta(ties(copies, options)), delta(ties(one, options))) < 1e-10


@each_space
@each_sparsifier
def test_the_order_of_adapters_decides_nothing(
    rng: np.random.Generator, space: str, sparsify: str
) -> None:
    given = updates(rng, weights=(1.0, 0.5, -0.8))
    turned = replace(
        given,
        factors=given.factors[::-1],
        weights=given.weights[::-1],
        keys=given.keys[::-1],
    )
    options = TiesOptions(space=space, sparsify=sparsify)
    assert apart(delta(ties(turned, options)), delta(ties(given, options))) < 1e-6


@each_space
@pytest.mark.parametrize("factor", [2.0, -0.5, 1e-3])
def test_longer_updates_merge_to_a_longer_update(
    rng: np.random.Generator, space: str, factor: float
) -> None:
    given = updates(rng)
    scaled = replace(given, weights=(factor,) * 3)
    options = TiesOptions(space=space)
    assert apart(delta(ties(scaled, options)), factor * delta(ties(given, options))) < 1e-10


def single_entries(*values: float) -> Updates:
    """Updates of one entry each."""
    one = np.ones((1, 1, 1))
    factors = tuple(LowRank(one, one * value) for value in values)
    return Updates(factors, (1.0,) * len(values), (1.0,) * len(values))


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ((3.0, -1.0), 3.0),  # the larger mass wins, the other side has no say
        ((3.0, 1.0, -2.0), 2.0),  # the mean of those that agree
        ((3.0, -1.0, -1.5), 3.0),  # mass, not count
        ((2.0, 0.0, 0.0), 2.0),  # zeros are not counted
        ((2.0, -2.0), 2.0),  # a sum of 0 elects +
        ((-2.0, 1.0, 1.0), 1.0),
        ((0.0, 0.0), 0.0),
        ((-4.0, 1.0), -4.0),
    ],
)
def test_an_entry_is_elected_and_averaged_by_hand(values: tuple[float, ...], wanted: float) -> None:
    found = delta(ties(single_entries(*values), TiesOptions(space="dense", sparsify="none")))
    assert found.item() == pytest.approx(wanted, abs=1e-12)


def test_weights_enter_before_the_election_and_are_no_divisor() -> None:
    given = replace(single_entries(3.0, -1.0, 1.0), weights=(0.25, 2.0, 0.5))
    found = delta(ties(given, TiesOptions(space="dense", sparsify="none")))
    assert found.item() == pytest.approx(-2.0)  # .75 + .5 against 2
    equal = replace(single_entries(3.0, 1.0, -1.0), weights=(0.5, 0.5, 0.5))
    found = delta(ties(equal, TiesOptions(space="dense", sparsify="none")))
    assert found.item() == pytest.approx(1.0)  # (1.5 + .5) / 2, not / (.5 + .5)


def file_delta(result: loramerge.Result, name: str) -> np.ndarray:
    read = result.adapter.read(name)
    return read.B.astype(float) @ read.A.astype(float)


def test_a_dense_merge_of_full_rank_loses_nothing(three: list[Path]) -> None:
    loaded = [loramerge.load(path) for path in three]
    result, report = loramerge.run(
        "ties", three, space="dense", rank="full", scale="paper", save_dtype="float32"
    )
    assert report.rank == (24, 24)
    for name in loaded[0].modules:
        deltas = [(u.B.astype(float) @ u.A.astype(float)) for u in (a.read(name) for a in loaded)]
        wanted = entries.elect_and_mean([entries.trim(x, 0.2) for x in deltas])
        assert apart(file_delta(result, name), wanted) < 1e-5  # float32


@pytest.mark.parametrize("space", SPACES)
def test_the_scale_is_that_of_the_merge_before_it_is_cut(
    three: list[Path], monkeypatch: pytest.MonkeyPatch, space: str
) -> None:
    _, whole = loramerge.run("ties", three, space=space, rank="full")
    for name, value in (("SMALL", 8), ("STEPS", 0), ("OVERSAMPLE", 1)):
        monkeypatch.setattr(dense, name, value)  # a dense result then has 2 terms of 24
    _, cut = loramerge.run("ties", three, space=space, rank=1)
    assert cut.scale == pytest.approx(whole.scale, rel=1e-5)
    for policy in ("norm", "ls"):
        assert cut.others[policy] == pytest.approx(whole.others[policy], rel=1e-5)


def test_only_a_plain_sum_answers_for_its_error(three: list[Path]) -> None:
    loramerge.run("ties", three, max_error=0.5)
    loramerge.run("arithmetic", three, sparsify="magnitude", max_error=0.5)
    with pytest.raises(GateError):
        # half floats hold no sum to 1e-9
        loramerge.run("arithmetic", three, max_error=1e-9, save_dtype="float16")


def test_a_plain_sum_is_concatenated_and_nothing_else(rng: np.random.Generator) -> None:
    given = updates(rng, weights=(1.0, 0.5, -2.0), dtype=np.float32)
    arithmetic = method("arithmetic")
    found = arithmetic.rule(given, arithmetic.options())
    assert found.A.tobytes() == np.concatenate([f.A for f in given.factors], -2).tobytes()
    pairs = zip(given.factors, given.weights, strict=True)
    scaled = [f.B * np.float32(w) for f, w in pairs]
    assert found.B.tobytes() == np.concatenate(scaled, -1).tobytes()
    assert arithmetic.exact(arithmetic.options())
    assert not arithmetic.exact(arithmetic.options(sparsify="magnitude"))
