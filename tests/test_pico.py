"""Pico beside what its published code does to the B of a module (github.com/yixuantt/Pico)."""

import numpy as np
from msgspec.structs import replace

from loramerge.adapter import LowRank
from loramerge.algorithms.arithmetic import ArithmeticOptions, arithmetic
from loramerge.linalg.calibrations import calibrated, prepared
from tests.entries import apart, delta, low_rank, updates


def test_pico_is_what_its_code_makes_of_b_where_every_a_has_orthonormal_rows(
    rng: np.random.Generator,
) -> None:
    given = updates(rng, ranks=(4, 4, 4))
    rows = [np.linalg.qr(one.A.swapaxes(-1, -2))[0].swapaxes(-1, -2) for one in given.factors]
    factors = tuple(LowRank(A, one.B) for A, one in zip(rows, given.factors, strict=True))
    given = replace(given, factors=factors)
    summed = arithmetic(prepared("pico", given), ArithmeticOptions())
    found = delta(low_rank(calibrated("pico", given, summed)))
    for item in range(2):
        stored = [one.B[item] for one in factors]
        U, s, _ = np.linalg.svd(np.concatenate(stored, 1), full_matrices=False)
        less = 1 / (1 + 2 * s**2 / np.sum(s**2)) - 1
        total = np.sum(
            [(B + U * less @ (U.T @ B)) @ A[item] for B, A in zip(stored, rows, strict=True)], 0
        )
        length = np.mean([np.linalg.norm(B) for B in stored])
        assert apart(found[item], total * length / np.linalg.norm(total)) < 1e-8
