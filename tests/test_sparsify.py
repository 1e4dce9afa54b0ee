"""Sparsifiers, against each paper's words written out, and by the laws of thinning."""

import math

import numpy as np
import pytest
from msgspec.structs import replace

from loramerge.adapter import LowRank, Updates
from loramerge.algorithms._options import SparseOptions
from loramerge.algorithms._rules import merge_entries
from loramerge.algorithms._spaces import encode
from loramerge.algorithms._sparsify import sparsifier
from loramerge.errors import UsageError
from loramerge.recipe import Named, make_recipe
from tests import entries
from tests.entries import apart, delta, updates, weighted

DENSITIES = (0.01, 0.2, 0.5, 0.99)
each_density = pytest.mark.parametrize("density", DENSITIES)


def thinned(given: Updates, position: int, **values: object) -> np.ndarray:
    """What a sparsifier leaves of one adapter in dense space. [b, m, n]"""
    stack = encode(given, "dense")
    thin = sparsifier(stack, position, SparseOptions(space="dense", **values))
    tiles = [thin(stack.tile(position, rows), rows.start) for rows in stack.tiles()]
    return np.concatenate(tiles, axis=-2)


def full(given: Updates, position: int) -> np.ndarray:
    return np.stack([weighted(given, i)[position] for i in range(len(given.keys[0]))])


@each_density
def test_magnitude_keeps_the_largest_entries(rng: np.random.Generator, density: float) -> None:
    given = updates(rng)
    found = thinned(given, 1, sparsify="magnitude", density=density)
    wanted = np.stack([entries.trim(x, density) for x in full(given, 1)])
    np.testing.assert_allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize(
    ("density", "shape", "wanted"),
    [(0.07, (10, 10), 7), (0.28, (5, 5), 7), (0.55, (4, 25), 55), (0.25, (3, 3), 3)],
)
def test_magnitude_keeps_exactly_the_share_rounded_up(
    rng: np.random.Generator, density: float, shape: tuple[int, int], wanted: int
) -> None:
    # 0.07 * 100 is 7, though not in floating point
    given = updates(rng, *shape, ranks=(2,))
    kept = np.count_nonzero(thinned(given, 0, sparsify="magnitude", density=density), (1, 2))
    assert kept.tolist() == [wanted, wanted]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_of_equal_entries_the_first_are_kept(dtype: type) -> None:
    ones = LowRank(np.ones((1, 1, 6), dtype), np.ones((1, 50, 1), dtype))
    given = Updates((ones,), (1.0,), (1.0,))
    found = thinned(given, 0, sparsify="magnitude", density=0.25)
    assert found.ravel()[:75].all()
    assert not found.ravel()[75:].any()


@pytest.mark.parametrize("sparsify", ["magnitude", "breadcrumbs"])
def test_a_large_tensor_keeps_exactly_its_share(rng: np.random.Generator, sparsify: str) -> None:
    # float32 entries of a large tensor are often equal to the bit
    given = updates(rng, 3000, 1100, ranks=(4,), batch=1, dtype=np.float32)
    found = thinned(given, 0, sparsify=sparsify, density=0.2)
    assert np.count_nonzero(found) == math.ceil(0.2 * 3000 * 1100)


@each_density
def test_dare_drops_what_its_mask_says_and_rescales_the_rest(
    rng: np.random.Generator, density: float
) -> None:
    given = updates(rng)
    found = thinned(given, 2, sparsify="dare", density=density)
    wanted = [
        entries.dare(x, density, key) for x, key in zip(full(given, 2), given.keys[2], strict=True)
    ]
    np.testing.assert_allclose(found, np.stack(wanted), atol=1e-12)


@pytest.mark.parametrize(("density", "epsilon"), [(0.2, 0.1), (0.5, 0.5), (0.3, 0.05), (0.9, 0.1)])
def test_della_drops_by_rank_within_the_row(
    rng: np.random.Generator, density: float, epsilon: float
) -> None:
    given = updates(rng)
    found = thinned(given, 0, sparsify="della", density=density, epsilon=epsilon)
    wanted = [
        entries.della(x, density, epsilon, key)
        for x, key in zip(full(given, 0), given.keys[0], strict=True)
    ]
    np.testing.assert_allclose(found, np.stack(wanted), atol=1e-10)


def test_equal_magnitudes_in_a_row_are_ranked_by_index() -> None:
    row = np.array([[[1.0, -1.0, 0.5, 1.0, -0.5, 2.0]]], np.float32)
    given = Updates((LowRank(row, np.ones((1, 4, 1), np.float32)),), (1.0,), (1.0,), keys=((9,),))
    found = thinned(given, 0, sparsify="della", density=0.5, epsilon=0.4)
    wanted = entries.della(np.repeat(row[0].astype(float), 4, 0), 0.5, 0.4, 9)
    np.testing.assert_allclose(found[0], wanted, rtol=1e-6)  # float32


@pytest.mark.parametrize(("density", "epsilon"), [(0.05, 0.1), (0.95, 0.3)])
def test_della_takes_as_much_epsilon_as_there_is_room_for(
    rng: np.random.Generator, density: float, epsilon: float
) -> None:
    given = updates(rng)
    found = thinned(given, 0, sparsify="della", density=density, epsilon=epsilon)
    room = thinned(given, 0, sparsify="della", density=density, epsilon=0.05)
    np.testing.assert_allclose(found, room, rtol=1e-12)


@pytest.mark.parametrize("sparsify", ["dare", "della"])
def test_what_is_dropped_at_random_is_made_up_for_on_average(
    rng: np.random.Generator, sparsify: str
) -> None:
    # 4,000 masks of the same update: the mean entry is off by its standard error
    one = updates(rng, m=6, n=8, ranks=(3,), batch=1)
    trials, density = 4000, 0.3
    A, B = (np.repeat(x, trials, 0) for x in (one.factors[0].A, one.factors[0].B))
    given = Updates((LowRank(A, B),), (1.0,), (1.0,), keys=(tuple(range(trials)),))
    found = thinned(given, 0, sparsify=sparsify, density=density)
    error = found.std(0) / math.sqrt(trials)
    assert (np.abs(found.mean(0) - full(one, 0)[0]) < 4.5 * error).all()
    kept = np.count_nonzero(found) / found.size
    assert abs(kept - density) < 4.5 * math.sqrt(density * (1 - density) / found.size)


@pytest.mark.parametrize(
    ("density", "gamma"), [(0.2, 0.01), (0.5, 0.2), (0.9, 0.3), (0.2, 1e-5), (0.2, 0.0)]
)
def test_breadcrumbs_drop_both_ends(rng: np.random.Generator, density: float, gamma: float) -> None:
    given = updates(rng)
    found = thinned(given, 1, sparsify="breadcrumbs", density=density, gamma=gamma)
    wanted = np.stack([entries.breadcrumbs(x, density, gamma) for x in full(given, 1)])
    np.testing.assert_allclose(found, wanted, atol=1e-12)
    assert np.count_nonzero(found) == 2 * math.ceil(density * 60 * 45)


def test_breadcrumbs_of_a_small_tensor_drop_no_outlier_rather_than_everything(
    rng: np.random.Generator,
) -> None:
    # mergekit's slice [n:-0] is empty where gamma n rounds to none
    given = updates(rng, 4, 5, ranks=(2,))
    found = thinned(given, 0, sparsify="breadcrumbs", density=0.5, gamma=0.01)
    assert np.count_nonzero(found) == 20
    np.testing.assert_array_equal(found, thinned(given, 0, sparsify="magnitude", density=0.5))


@pytest.mark.parametrize("space", ["knots", "core", "dense"])
@pytest.mark.parametrize("sparsify", ["magnitude", "dare", "della", "breadcrumbs"])
def test_density_one_leaves_everything(rng: np.random.Generator, sparsify: str, space: str) -> None:
    given = updates(rng, weights=(1.0, -0.5, 2.0), dtype=np.float32)
    gamma = {"gamma": 0.0} if sparsify == "breadcrumbs" else {}
    options = SparseOptions(sparsify=sparsify, density=1.0, space=space, **gamma)
    found = delta(merge_entries(given, options, options.space, lambda values: values.sum(0)))
    wanted = np.stack([sum(weighted(given, item)) for item in range(2)])
    assert apart(found, wanted) < 1e-5  # float32


@pytest.mark.parametrize("space", ["knots", "core", "dense"])
def test_coordinates_lose_entries_by_their_own_size(rng: np.random.Generator, space: str) -> None:
    given = updates(rng)
    options = SparseOptions(sparsify="magnitude", density=0.3, space=space)
    found = delta(merge_entries(given, options, options.space, lambda values: values.sum(0)))
    for item in range(2):
        wanted = entries.in_space(
            space, weighted(given, item), lambda xs: sum(entries.trim(x, 0.3) for x in xs)
        )
        assert apart(found[item], wanted) < 1e-10


def test_updates_without_keys_get_masks_of_their_own(rng: np.random.Generator) -> None:
    given = replace(updates(rng, ranks=(3, 3)), keys=())
    kept = [thinned(given, t, sparsify="dare", density=0.5) != 0 for t in range(2)]
    assert 0.4 < (kept[0] == kept[1]).mean() < 0.6


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"density": 0.5}, "--density"),
        ({"sparsify": "dare", "epsilon": 0.2}, "--epsilon"),
        ({"sparsify": "magnitude", "gamma": 0.2}, "--gamma"),
    ],
)
def test_a_value_that_would_do_nothing_is_refused(values: dict[str, object], flag: str) -> None:
    with pytest.raises(UsageError, match=f"arithmetic: {flag} needs --sparsify") as caught:
        make_recipe("arithmetic", [Named("a")], values)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("preset", ["magnitude", "dare", "della", "breadcrumbs"])
def test_a_preset_is_arithmetic_with_its_sparsifier(preset: str) -> None:
    recipe = make_recipe(preset, [Named("a")], {"density": 0.4})
    assert recipe.method.name == "arithmetic"
    assert recipe.options.sparsify == preset
    assert recipe.options.density == 0.4
