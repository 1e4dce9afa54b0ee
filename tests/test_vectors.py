"""Methods that see an update as one long vector, each written out in dense float64, and by laws."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

import loramerge
from loramerge.adapter import LowRank, Updates
from loramerge.errors import UsageError
from loramerge.linalg.factors import inner_products
from loramerge.recipe import Named, make_recipe
from loramerge.registry import method
from tests.build import write_peft
from tests.conftest import factors
from tests.entries import apart, delta, updates, weighted
from tests.updates import CASES, Case, dense

Vectors = Sequence[np.ndarray]
each_weighting = pytest.mark.parametrize("weights", [(1, 1, 1), (0.7, 1.3, 0.4), (1, -0.5, 2)])
PLAIN = ("karcher", "stock", "ema")  # as many adapters as there are


def angle(x: np.ndarray, y: np.ndarray) -> float:
    return math.acos(np.vdot(x, y) / np.linalg.norm(x) / np.linalg.norm(y))


def slerp(vectors: Vectors, weights: Sequence[float], t: float) -> np.ndarray:
    x, y = (w * v for w, v in zip(weights, vectors, strict=True))
    theta = angle(x, y)
    return (math.sin((1 - t) * theta) * x + math.sin(t * theta) * y) / math.sin(theta)


def sphere_mean(points: Vectors, shares: Sequence[float]) -> np.ndarray:
    """The Karcher mean of unit vectors, by small steps along the gradient."""
    mean = sum(s * p for s, p in zip(shares, points, strict=True))
    mean /= np.linalg.norm(mean)
    for _ in range(400):
        gradient = np.zeros_like(mean)
        for share, point in zip(shares, points, strict=True):
            tangent = point - np.vdot(mean, point) * mean
            if (length := np.linalg.norm(tangent)) > 1e-12:
                gradient += share * angle(mean, point) * tangent / length
        mean = mean + 0.3 * gradient / sum(shares)
        mean /= np.linalg.norm(mean)
    return mean


def karcher(vectors: Vectors, weights: Sequence[float]) -> np.ndarray:
    total = np.zeros_like(vectors[0])
    for sign in (1, -1):
        group = [(sign * w, v) for w, v in zip(weights, vectors, strict=True) if sign * w > 0]
        if group:
            length = sum(w * np.linalg.norm(v) for w, v in group) / len(vectors)
            units = [v / np.linalg.norm(v) for _, v in group]
            total += sign * length * sphere_mean(units, [w for w, _ in group])
    return total


def stock(vectors: Vectors, weights: Sequence[float]) -> np.ndarray:
    count = len(vectors)
    pairs = [(x, y) for i, x in enumerate(vectors) for y in vectors[:i]]
    cosine = max(0, np.mean([math.cos(angle(x, y)) for x, y in pairs]))
    ratio = count * cosine / (1 + (count - 1) * cosine)
    return ratio * sum(w * v for w, v in zip(weights, vectors, strict=True)) / count


def ema(vectors: Vectors, weights: Sequence[float], decay: float) -> np.ndarray:
    """The running average that starts at nothing, and what it lacks to 1 (as Adam's moments)."""
    average, whole = np.zeros_like(vectors[0]), 0.0
    for weight, vector in zip(weights, vectors, strict=True):
        average = decay * average + (1 - decay) * weight * vector
        whole = decay * whole + (1 - decay)
    return average / whole


def merged(name: str, given: Updates, **options: float) -> np.ndarray:
    found = method(name)
    return delta(found.rule(given, found.options(**options)))


def close_to(name: str, written: Callable[..., np.ndarray], given: Updates, **o: float) -> float:
    """How far a method is from its transcription, item by item."""
    plain = replace(given, weights=(1.0,) * len(given.factors))
    wanted = [written(weighted(plain, i), given.weights, **o) for i in range(2)]
    return apart(merged(name, given, **o), np.stack(wanted))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 1.3), (1.0, -0.5)])
@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_slerp_is_its_formula(
    rng: np.random.Generator, weights: tuple[float, ...], t: float
) -> None:
    given = updates(rng, ranks=(4, 6), weights=weights)
    assert close_to("slerp", slerp, given, t=t) < 1e-10


@each_weighting
def test_karcher_is_where_small_steps_on_the_sphere_end(
    rng: np.random.Generator, weights: tuple[float, ...]
) -> None:
    given = leaning(rng, weights)
    assert close_to("karcher", karcher, given) < 1e-8


@each_weighting
def test_stock_is_its_formula(rng: np.random.Generator, weights: tuple[float, ...]) -> None:
    assert close_to("stock", stock, leaning(rng, weights)) < 1e-10


@each_weighting
@pytest.mark.parametrize("decay", [0.3, 0.8])
def test_ema_is_the_running_average(
    rng: np.random.Generator, weights: tuple[float, ...], decay: float
) -> None:
    given = updates(rng, weights=weights)
    assert close_to("ema", ema, given, decay=decay) < 1e-10


def leaning(rng: np.random.Generator, weights: Sequence[float]) -> Updates:
    """Three updates of unequal lengths at 50 to 70 degrees to each other."""
    given = updates(rng, ranks=(4, 6, 3), weights=weights)
    first = given.factors[0]
    both = [
        LowRank(np.concatenate([f.A, first.A], -2), np.concatenate([f.B, size * first.B], -1))
        for f, size in zip(given.factors[1:], (0.8, 0.5), strict=True)
    ]
    return replace(given, factors=(first, *both))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_inner_products_are_those_of_the_delta_weights(case: Case) -> None:
    given, _ = case
    flat = [dense(update).ravel() for update in given]
    wanted = np.array([[x @ y for y in flat] for x in flat])
    lengths = np.sqrt(np.diag(wanted))
    # float64 throughout; cosines of updates that are far apart are sums that cancel
    assert np.abs(inner_products(given)[0] - wanted).max() <= 1e-12 * lengths.max() ** 2 + 1e-300


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_copies_of_an_adapter_are_the_adapter(
    rng: np.random.Generator, name: str, count: int
) -> None:
    one = updates(rng, ranks=(5,))
    copies = Updates(one.factors * count, (1.0,) * count, (1.0,) * count)
    assert apart(merged(name, copies), delta(one.factors[0])) < 1e-7  # angles end at 1e-8


def test_slerp_of_two_copies_is_the_adapter(rng: np.random.Generator) -> None:
    one = updates(rng, ranks=(5,))
    copies = Updates(one.factors * 2, (1.0, 1.0), (1.0, 1.0))
    assert apart(merged("slerp", copies, t=0.3), delta(one.factors[0])) < 1e-10


@pytest.mark.parametrize("name", ["slerp", *PLAIN])
def test_near_copies_and_their_rounding_make_no_difference(
    rng: np.random.Generator, name: str
) -> None:
    one = updates(rng, ranks=(5,)).factors[0]
    near = [LowRank(one.A, one.B + 1e-3 * rng.standard_normal(one.B.shape)) for _ in range(2)]
    first, second = (Updates((one, other), (1.0, 1.0), (1.0, 1.0)) for other in near)
    assert apart(merged(name, first), merged(name, second)) < 1e-2


def right_angled(count: int, size: int = 8) -> Updates:
    """Updates of length 1, each in a row of its own."""
    made = []
    for row in range(count):
        B = np.zeros((1, size, 1))
        B[0, row] = 1
        made.append(LowRank(np.full((1, 1, 4), 0.5), B))
    return Updates(tuple(made), (1.0,) * count, (1.0,) * count)


def length(x: np.ndarray) -> float:
    return float(np.linalg.norm(x))


def test_the_arc_keeps_the_length_that_a_straight_line_loses() -> None:
    for t in (0.25, 0.5, 0.8):
        assert length(merged("slerp", right_angled(2), t=t)) == pytest.approx(1)
    for count in (2, 5, 8):
        assert length(merged("karcher", right_angled(count))) == pytest.approx(1)


def test_on_equal_lengths_slerp_is_a_weighted_karcher_mean(rng: np.random.Generator) -> None:
    given = updates(rng, ranks=(4, 4))
    even = [
        LowRank(f.A, f.B / np.linalg.norm(delta(f), axis=(1, 2))[:, None, None])
        for f in given.factors
    ]
    arc = merged("slerp", replace(given, factors=tuple(even)), t=0.3)
    mean = merged("karcher", replace(given, factors=tuple(even), weights=(1.4, 0.6)))
    assert apart(mean, arc) < 1e-7


def test_karcher_averages_what_is_added_and_what_is_taken_away_apart() -> None:
    given = replace(right_angled(4), weights=(1.0, 1.0, -1.0, -1.0))
    rows = merged("karcher", given)[0] @ np.full(4, 0.5)
    # A mean of two, of length 1 at 45 degrees, times 2 of the 4 adapters.
    assert rows[:4] == pytest.approx(np.array([1, 1, -1, -1]) * math.sqrt(0.5) / 2)


@pytest.mark.parametrize("name", ["slerp", "karcher", "stock"])
def test_an_update_and_its_opposite_leave_nothing(rng: np.random.Generator, name: str) -> None:
    one = updates(rng, ranks=(5,)).factors[0]
    opposite = LowRank(one.A, -one.B)
    found = merged(name, Updates((one, opposite), (1.0, 1.0), (1.0, 1.0)))
    assert length(found) <= 1e-12 * length(delta(one))


def test_stock_trusts_a_mean_as_far_as_its_members_agree(rng: np.random.Generator) -> None:
    assert length(merged("stock", right_angled(5))) == 0
    given = updates(rng, ranks=(4, 4))
    x, y = given.factors
    leaning = LowRank(np.concatenate([x.A, y.A], -2), np.concatenate([x.B, y.B], -1))
    away = LowRank(x.A, -x.B)
    for other, least, most in ((leaning, 0.5, 1.0), (away, 0.0, 0.0)):
        pair = replace(given, factors=(x, other))
        mean = (delta(x) + delta(other)) / 2
        share = length(merged("stock", pair)) / max(length(mean), 1)
        assert least <= share <= most


def test_a_run_of_decay_one_is_a_mean_and_of_decay_zero_its_last_checkpoint(
    rng: np.random.Generator,
) -> None:
    given = updates(rng)
    plain = np.mean([weighted(given, item) for item in range(2)], axis=1)
    last = np.stack([weighted(given, item)[-1] for item in range(2)])
    assert apart(merged("ema", given, decay=1.0), plain) < 1e-12
    assert apart(merged("ema", given, decay=0.0), last) < 1e-12


@pytest.mark.parametrize("count", [1, 3])
def test_slerp_takes_two(count: int) -> None:
    with pytest.raises(UsageError, match=f"slerp takes 2 adapters, not {count}"):
        make_recipe("slerp", [Named("a")] * count, {})


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("slerp", math.sin(math.pi / 4)),  # half way to what is at right angles
        ("karcher", 0.5),  # one direction, half of the mean length
        ("stock", 0.0),
        ("ema", 0.8 / 1.8),  # the first of two checkpoints
    ],
)
def test_what_an_adapter_lacks_counts_as_zero_in_its_place(
    tmp_path: Path, rng: np.random.Generator, name: str, share: float
) -> None:
    whole, part = factors(rng, 4), factors(rng, 4)
    lone = list(whole)[1]
    del part[lone]
    paths = [write_peft(tmp_path / str(i), p, lora_alpha=4) for i, p in enumerate((whole, part))]
    result, _ = loramerge.run(name, paths, rank="full", save_dtype="float32")
    found = result.adapter.read(lone)
    A, B = whole[lone]
    assert apart(found.B @ found.A + B @ A, (1 + share) * B @ A) < 1e-6  # float32
