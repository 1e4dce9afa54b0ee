"""How long a merge is: the factor that brings the whole adapter to the asked-for norm."""

import math
from typing import Literal, TypeAlias

from msgspec import Struct

__all__ = ["AUTO_EXPONENT", "ScaleName", "Totals", "factor"]

ScaleName: TypeAlias = Literal["paper", "auto", "norm", "ls"]

# Measured on the validation split of the testbed: near-orthogonal adapters of equal norm come out
# at .85 sqrt(T) of one adapter's norm for T = 8 and .95 sqrt(T) for T = 2.
AUTO_EXPONENT = 0.42


class Totals(Struct, frozen=True):
    """Squared norms and inner products over all modules of an adapter.

    parts: ||w_t dW_t||^2 for each adapter; target: ||sum_t w_t dW_t||^2; result: ||dW_out||^2
    before scaling and truncation; inner: <dW_out, sum_t w_t dW_t>; paper: ||dW_out||^2 with the
    factor of the method's paper on each module.
    """

    parts: tuple[float, ...]
    target: float
    result: float
    inner: float
    paper: float | None = None


def factor(name: ScaleName, totals: Totals) -> float:
    """The factor on a merge whose own length is `totals.result`; 1 for a zero merge.

    paper: what the factors of the method's paper make of the whole, 1 where it has none.
    auto: ||dW|| = mean_t ||w_t dW_t|| * T_eff^0.42 with
    T_eff = clip((sum_t ||w_t dW_t||)^2 / ||sum_t w_t dW_t||^2, 1, T), so that one adapter, or T
    copies of one, come back unchanged. norm: the same with exponent 0. ls: the factor that brings
    the merge closest to the weighted sum.
    """
    if totals.result <= 0:
        return 1.0
    if name == "paper":
        return 1.0 if totals.paper is None else math.sqrt(totals.paper / totals.result)
    if name == "ls":
        return totals.inner / totals.result
    norms = [math.sqrt(part) for part in totals.parts]
    count = len(norms)
    mean = sum(norms) / count
    if name == "norm":
        return mean / math.sqrt(totals.result)
    square = sum(norms) ** 2
    effective = count if totals.target <= 0 else min(max(square / totals.target, 1.0), count)
    return mean * math.pow(effective, AUTO_EXPONENT) / math.sqrt(totals.result)
