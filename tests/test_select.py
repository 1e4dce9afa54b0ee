"""The k largest magnitudes of a tiled matrix, against a stable sort of the whole."""

from collections.abc import Sequence

import numpy as np
import pytest

from loramerge.linalg import select
from loramerge.linalg.select import Largest, largest
from tests.backends import BACKENDS

each_backend = pytest.mark.parametrize("backend", ["numpy", "torch", "strict"])


def rows_of(height: int, tile: int) -> list[slice]:
    return [slice(top, min(top + tile, height)) for top in range(0, height, tile)]


def choose(
    matrix: np.ndarray,
    count: Sequence[int],
    tile: int = 8,
    backend: str = "numpy",
    sample: np.ndarray | None = None,
) -> np.ndarray:
    """The chosen entries of magnitudes [b, p, q], put together from tiles of another height."""
    used = BACKENDS[backend]
    whole = used.put(matrix)
    part = matrix[:, ::3, ::2] if sample is None else sample
    flat = used.put(np.ascontiguousarray(part.reshape(len(matrix), -1)))
    wanted = used.put(np.asarray(count, np.int64))
    rows = rows_of(matrix.shape[1], tile)
    found = largest(lambda r: whole[..., r, :], rows, wanted, flat)
    return chosen(found, matrix, 5, backend)


def chosen(found: Largest, matrix: np.ndarray, tile: int, backend: str) -> np.ndarray:
    used = BACKENDS[backend]
    whole = used.put(matrix)
    parts = [
        used.take(found.chosen(whole[..., r, :], r.start)) for r in rows_of(matrix.shape[1], tile)
    ]
    return np.concatenate(parts, axis=1)


def sorted_choice(matrix: np.ndarray, count: Sequence[int]) -> np.ndarray:
    """The same by a stable sort: of equal magnitudes the first come first."""
    picked = np.zeros((len(matrix), matrix[0].size), bool)
    for item, row, k in zip(matrix, picked, count, strict=True):
        row[np.argsort(-item.ravel(), kind="stable")[:k]] = True
    return picked.reshape(matrix.shape)


@pytest.fixture
def matrix(rng: np.random.Generator) -> np.ndarray:
    """Three matrices of different sizes of entries, no two equal. [3, 37, 29]"""
    scale = np.array([1, 1e-6, 1e6])[:, None, None]
    return (np.abs(rng.standard_normal((3, 37, 29))) * scale).astype(np.float32)


@each_backend
@pytest.mark.parametrize("count", [1, 2, 200, 536, 1072, 1073])
def test_exactly_the_largest_are_chosen(matrix: np.ndarray, count: int, backend: str) -> None:
    found = choose(matrix, [count] * 3, backend=backend)
    np.testing.assert_array_equal(found, sorted_choice(matrix, [count] * 3))


@each_backend
@pytest.mark.parametrize("digits", [0, 1, 2])
@pytest.mark.parametrize("tile", [1, 8, 37])
def test_of_equal_magnitudes_the_first_are_chosen(
    rng: np.random.Generator, digits: int, tile: int, backend: str
) -> None:
    matrix = np.round(np.abs(rng.standard_normal((2, 37, 29))), digits) + np.float32(1)
    count = [500, 77]
    found = choose(matrix.astype(np.float32), count, tile, backend)
    np.testing.assert_array_equal(found, sorted_choice(matrix, count))


def test_each_item_of_a_batch_has_its_own_count(matrix: np.ndarray) -> None:
    count = [0, 10, 1073]
    np.testing.assert_array_equal(choose(matrix, count), sorted_choice(matrix, count))


@pytest.mark.parametrize("tile", [1, 2, 36, 100])
def test_tiles_decide_nothing(matrix: np.ndarray, tile: int) -> None:
    count = [100, 300, 900]
    np.testing.assert_array_equal(choose(matrix, count, tile), sorted_choice(matrix, count))


@pytest.mark.parametrize("lie", [0.0, 1e-3, 1e3])
def test_a_sample_that_misleads_costs_time_but_no_truth(matrix: np.ndarray, lie: float) -> None:
    sample = matrix * np.float32(lie)
    found = choose(matrix, [400] * 3, sample=sample)
    np.testing.assert_array_equal(found, sorted_choice(matrix, [400] * 3))


def test_a_true_sample_needs_one_pass(rng: np.random.Generator) -> None:
    low_rank = rng.standard_normal((2, 600, 8)) @ rng.standard_normal((2, 8, 500))
    matrix = (np.abs(low_rank) * np.array([1, 1e-3])[:, None, None]).astype(np.float32)
    looks = []

    def tile(rows: slice) -> np.ndarray:
        looks.append(rows)
        return matrix[:, rows]

    rows = rows_of(600, 32)
    for count in (1, 3_000, 60_000, 150_000, 299_000):
        looks.clear()
        sample = matrix[:, 1::3, 1::3].reshape(2, -1)
        found = largest(tile, rows, np.array([count, count]), sample)
        assert chosen(found, matrix, 64, "numpy").sum((1, 2)).tolist() == [count, count]
        assert len(looks) == len(rows) + 1  # and one to learn the width


def test_where_there_are_fewer_than_wanted_all_but_zeros_are_chosen() -> None:
    matrix = np.zeros((1, 6, 5), np.float32)
    matrix[0, 2, 3], matrix[0, 5, 0] = 2.0, 1e-30
    found = choose(matrix, [20])
    assert found[0, 2, 3]
    assert found[0, 5, 0]


def test_a_matrix_of_zeros_is_taken() -> None:
    for count in (0, 1, 30):
        assert choose(np.zeros((1, 6, 5), np.float32), [count]).shape == (1, 6, 5)


def test_a_sample_that_is_somewhat_wrong_is_no_reason_to_sort_everything(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held at once is what is sorted: of a large module everything is more than there may be."""
    sorted_ones: list[int] = []
    kth = select._kth

    def spy(values: np.ndarray, *rest: float) -> np.ndarray | None:
        sorted_ones.append(values.shape[0])
        return kth(values, *rest)

    monkeypatch.setattr(select, "_kth", spy)
    matrix = np.abs(rng.standard_normal((1, 400, 250))).astype(np.float32)
    # As if .25 of the entries were as large as .2 are.
    cut = np.quantile(matrix, 0.8)
    low = matrix[matrix < cut]
    sample = np.concatenate([matrix[matrix >= cut], rng.permutation(low)[: 3 * matrix.size // 5]])
    picked = choose(matrix, [matrix.size // 5], sample=sample[None])
    assert np.array_equal(picked, sorted_choice(matrix, [matrix.size // 5]))
    assert len(sorted_ones) == 2
    assert max(sorted_ones) < 0.3 * matrix.size
