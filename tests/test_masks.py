"""Random masks: numbers that depend on key, row and column alone, and look random."""

import numpy as np
import pytest

from loramerge.linalg.masks import uniform
from tests.backends import BACKENDS

KEY, SIZE = 20231106, 1024
LIKE = np.zeros((1, 1, 1), np.float32)


@pytest.fixture(scope="module")
def square() -> np.ndarray:
    """A square of numbers under one key."""
    return uniform([KEY], (0, 0), (SIZE, SIZE), LIKE)[0].astype(np.float64)


def standard(x: np.ndarray) -> np.ndarray:
    """Uniform numbers with mean 0 and variance 1."""
    return (x - 0.5) * np.sqrt(12)


def mixed(x: int, between: int = 0) -> int:
    """The mixer on Python's integers, which cannot overflow."""
    x ^= x >> 16
    x = (x * 0x21F0AAAD + between) % 2**32
    x ^= x >> 15
    x = x * 0x735A2D97 % 2**32
    return x ^ (x >> 15)


def number(key: int, row: int, column: int) -> float:
    """One number, written out."""
    first = mixed(mixed((row + 0x243F6A89) % 2**32) ^ mixed((key + 0x1E3779B9) % 2**32))
    second = mixed((first + 0x1E3779B9) % 2**32) ^ key
    return (mixed(first ^ mixed((column + 0x2B7E1517) % 2**32), second) >> 8) / 2**24


def test_every_number_is_the_hash_of_its_key_row_and_column() -> None:
    keys, origin = [0, 7, 2**32 - 1], (5, 2**20)
    found = uniform(keys, origin, (4, 6), np.zeros((3, 1, 1)))
    wanted = [[[number(k, 5 + i, 2**20 + j) for j in range(6)] for i in range(4)] for k in keys]
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("top", [0, 1, 17, 63])
@pytest.mark.parametrize("left", [0, 1, 40])
def test_a_tile_holds_the_numbers_of_the_whole(top: int, left: int) -> None:
    whole = uniform([KEY], (0, 0), (64, 48), LIKE)
    tile = uniform([KEY], (top, left), (64 - top, 48 - left), LIKE)
    assert tile.tobytes() == whole[:, top:, left:].tobytes()


def test_an_item_of_a_batch_has_the_numbers_it_has_alone() -> None:
    keys = [3, KEY, 2**32 - 1, 4, 5, 6]
    batch = uniform(keys, (0, 0), (9, 11), np.zeros((2, 3, 1, 1), np.float32))
    for key, item in zip(keys, batch.reshape(6, 9, 11), strict=True):
        assert item.tobytes() == uniform([key], (0, 0), (9, 11), LIKE)[0].tobytes()


@pytest.mark.parametrize("backend", ["torch", "strict"])
def test_every_kind_of_array_gets_the_same_bits(backend: str) -> None:
    used = BACKENDS[backend]
    keys, shape = [0, KEY, 2**32 - 1], (33, 70)
    like = np.zeros((3, 1, 1), np.float32)
    found = used.take(uniform(keys, (100, 2**17), shape, used.put(like)))
    assert found.tobytes() == uniform(keys, (100, 2**17), shape, like).tobytes()


def test_float64_holds_the_values_of_float32(square: np.ndarray) -> None:
    double = uniform([KEY], (0, 0), (SIZE, SIZE), LIKE.astype(np.float64))
    np.testing.assert_array_equal(double[0], square)


def test_numbers_lie_in_zero_to_one_and_one_is_not_among_them(square: np.ndarray) -> None:
    assert square.min() >= 0
    assert square.max() < 1


# The statistics below have a standard normal distribution for true random numbers: 4.5 of its
# standard deviations come up once in 150,000 times.


def test_the_numbers_are_uniform(square: np.ndarray) -> None:
    cells = 4096
    counts = np.bincount((square * cells).astype(int).ravel(), minlength=cells)
    expected = square.size / cells
    chi = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi - (cells - 1)) / np.sqrt(2 * (cells - 1)) < 4.5
    assert abs(standard(square).mean()) * SIZE < 4.5


def test_the_low_bits_are_uniform_as_well(square: np.ndarray) -> None:
    counts = np.bincount((square * 2**24).astype(np.int64).ravel() % 256, minlength=256)
    expected = square.size / 256
    chi = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi - 255) / np.sqrt(2 * 255) < 4.5


@pytest.mark.parametrize("down", [0, 1, 2, 16, 256])
@pytest.mark.parametrize("right", [-1, 0, 1, 2, 16, 256])
def test_a_number_says_nothing_of_another(square: np.ndarray, down: int, right: int) -> None:
    if (down, right) == (0, 0):
        down = 3
    z = standard(square)
    assert abs((z * np.roll(z, (-down, -right), (0, 1))).mean()) * SIZE < 4.5


def test_rows_and_columns_have_no_mean_of_their_own(square: np.ndarray) -> None:
    for axis in (0, 1):
        spread = (standard(square).mean(axis) ** 2 * SIZE).mean()
        assert abs(spread - 1) * np.sqrt(SIZE / 2) < 4.5


def test_corners_of_rectangles_multiply_to_nothing(square: np.ndarray) -> None:
    # a hash that only adds a row's and a column's part fails here
    z = standard(square)
    for down in (1, 8, 500):
        for right in (1, 8, 500):
            product = z[:-down, :-right] * z[down:, :-right] * z[:-down, right:] * z[down:, right:]
            assert abs(product.mean()) * np.sqrt(product.size) < 4.5


def test_neighbouring_keys_have_nothing_in_common() -> None:
    keys = [*range(32), *(2**k for k in range(6, 32))]
    z = standard(uniform(keys, (0, 0), (128, 128), np.zeros((len(keys), 1, 1))))
    flat = z.reshape(len(keys), -1)
    related = flat @ flat.T / 128
    related[np.diag_indices(len(keys))] = 0
    assert np.abs(related).max() < 4.5


def test_rows_differ_though_their_first_words_may_not() -> None:
    # 65,536 rows: two 32-bit words are equal by chance in about half of such sets
    tall = uniform([KEY], (0, 0), (2**16, 3), LIKE)[0]
    assert len(np.unique(tall, axis=0)) == 2**16
