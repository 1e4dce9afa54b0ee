"""How long a merge is: the factor that brings the whole adapter to the asked-for norm."""

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

from msgspec import Struct

__all__ = ["AUTO_EXPONENT", "POLICIES", "ScaleName", "Totals", "factor"]

ScaleName: TypeAlias = Literal["paper", "auto", "norm", "ls", "size"]
POLICIES: tuple[ScaleName, ...] = get_args(ScaleName)

# Measured on the validation split of the testbed: near-orthogonal adapters of equal norm come out
# at .85 sqrt(T) of one adapter's norm for T = 8 and .95 sqrt(T) for T = 2.
AUTO_EXPONENT = 0.42
# The longer updates are, the shorter their merge should be: measured on 40 sets of eight adapters
# trained at 3e-4 (size .05), 1e-3 (.08) and 2e-3 (.12). Beyond these nothing was measured.
USUAL, SHRINKING = 0.078, 0.35
SMALL, LARGE = 0.06, 0.13
# From so many adapters in effect on; two hardly stand in each other's way.
MANY = 5


class Totals(Struct, frozen=True):
    """Squared norms and inner products over all modules of an adapter.

    parts: ||w_t dW_t||^2 for each adapter; target: ||sum_t w_t dW_t||^2; result: ||dW_out||^2
    before scaling and truncation; inner: <dW_out, sum_t w_t dW_t>; paper: ||dW_out||^2 with the
    factor of the method's paper on each module; rows: how many outputs all modules have.
    """

    parts: tuple[float, ...]
    target: float
    result: float
    inner: float
    paper: float | None = None
    rows: float = 1.0


def factor(name: ScaleName, totals: Totals) -> float:
    """The factor on a merge whose own length is `totals.result`; 1 for a zero merge.

    paper: what the factors of the method's paper make of the whole, 1 where it has none.
    auto: ||dW|| = mean_t ||w_t dW_t|| * T_eff^0.42 with
    T_eff = clip((sum_t ||w_t dW_t||)^2 / ||sum_t w_t dW_t||^2, 1, T), so that one adapter, or T
    copies of one, come back unchanged. norm: the same with exponent 0. ls: the factor that brings
    the merge closest to the weighted sum. size: as paper, less where updates are long and more
    where they are short: times (rho / 0.078)^(-0.35 c), rho = mean_t ||w_t dW_t|| / sqrt(rows)
    held between .06 and .13 and c = min((T_eff - 1) / 4, 1). Matrices of orthonormal rows
    are of length sqrt(rows), and weights of models near it, so rho says how long an update is
    beside what it is added to.
    """
    if totals.result <= 0:
        return 1.0
    if name == "paper":
        return 1.0 if totals.paper is None else math.sqrt(totals.paper / totals.result)
    if name == "size":
        return factor("paper", totals) * _by_size(totals)
    if name == "ls":
        return totals.inner / totals.result
    norms = [math.sqrt(part) for part in totals.parts]
    count = len(norms)
    mean = sum(norms) / count
    if name == "norm":
        return mean / math.sqrt(totals.result)
    return mean * math.pow(_effective(norms, totals), AUTO_EXPONENT) / math.sqrt(totals.result)


def _effective(norms: Sequence[float], totals: Totals) -> float:
    """How many adapters there are in effect, from 1 for copies to T at right angles."""
    count = float(len(norms))
    if totals.target <= 0:
        return count
    return min(max(sum(norms) ** 2 / totals.target, 1.0), count)


def _by_size(totals: Totals) -> float:
    """What the size of updates makes of the length of their merge; 1 for one adapter, or copies."""
    norms = [math.sqrt(part) for part in totals.parts]
    count = len(norms)
    size = sum(norms) / count / math.sqrt(totals.rows)
    crowd = min((_effective(norms, totals) - 1) / (MANY - 1), 1.0)
    return math.pow(min(max(size, SMALL), LARGE) / USUAL, -SHRINKING * crowd)
