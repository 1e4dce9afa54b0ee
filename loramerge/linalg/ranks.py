"""How many ranks each module of a result keeps, from its singular values."""

import math
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

from msgspec import Struct

from loramerge._lazy import np
from loramerge.adapter import Array

__all__ = ["Allocation", "Criterion", "choose"]

# Singular values below this share of the largest are the rounding of zeros.
ZERO = 1e-12
# A bound met but for the rounding of sums is met.
ROUNDING = 1e-12
# kohya's resize_lora takes an update for zero up to this largest singular value.
KOHYA_ZERO = 1e-6

Allocation: TypeAlias = Literal["uniform", "relative", "sigma", "energy"]


class Criterion(Struct, frozen=True):
    """What bounds the ranks: exactly one of the first seven; and in which steps they come.

    rank: ranks per module on average; energy: least share of squared singular values kept;
    max_error: largest relative Frobenius error; size: bytes of the written file. Of each module
    alone, as in kohya's resize_lora: sv_ratio keeps singular values above the largest divided by
    it, sv_cumulative a share of their sum, sv_fro a share of the Frobenius norm.

    `step`: ranks are multiples of it, or all a module has. `kohya`: ranks are those of resize_lora:
    one more than its rules need, even where that one is zero, and 1 for an update that is zero
    (where resize_lora looks before alpha / r is multiplied in, and we look after).
    """

    rank: int | None = None
    energy: float | None = None
    max_error: float | None = None
    size: int | None = None
    sv_ratio: float | None = None
    sv_cumulative: float | None = None
    sv_fro: float | None = None
    step: int = 1
    kohya: bool = False

    @property
    def kept_energy(self) -> float | None:
        """The least energy share that meets the bound: 1 - error^2."""
        return 1 - self.max_error**2 if self.max_error is not None else self.energy

    @property
    def budgeted(self) -> bool:
        """Whether the bound is on what may be spent, not on what must be kept."""
        return self.rank is not None or self.size is not None


def choose(
    spectra: Mapping[str, Array],
    shapes: Mapping[str, tuple[int, int]],
    criterion: Criterion,
    allocation: Allocation | None,
    file_size: Callable[[Mapping[str, int]], int],
    uniform: bool,
) -> dict[str, int]:
    """Ranks by module.

    Without an allocation, what must be kept is kept in every module on its own, and a step rounds
    its rank up. With one, energy and max_error hold for the adapter as a whole, and ranks are taken
    greedily, a step at a time, by score per parameter: `relative` (s / ||dW||)^2, `sigma` s,
    `energy` s^2, or one rank for all (`uniform`). So no step breaks a bound on rank or size.
    `file_size` tells the bytes of a file with given ranks. `uniform` asks for one stored rank: a
    per-module choice then becomes its largest. A module may end with rank 0.
    """
    if allocation is None and not criterion.budgeted:
        ranks = {name: _needed(s, shapes[name], criterion) for name, s in spectra.items()}
        return _capped(max(ranks.values(), default=0), spectra) if uniform else ranks
    if uniform or allocation in (None, "uniform"):
        return _uniform(spectra, criterion, file_size)
    assert allocation is not None
    return _greedy(spectra, shapes, criterion, allocation, file_size)


def _needed(s: Array, shape: tuple[int, int], criterion: Criterion) -> int:
    """The rank of one module that meets a bound on it alone, rounded up to a step."""
    most = min(len(s) + criterion.kohya, *shape)
    largest = float(s.max(initial=0.0))
    if criterion.sv_ratio is not None:
        rank = int(np.count_nonzero(s > largest / criterion.sv_ratio))
    elif criterion.sv_cumulative is not None:
        rank = _enough(s, 1, criterion.sv_cumulative)
    elif criterion.sv_fro is not None:
        rank = _enough(s, 2, criterion.sv_fro**2)
    else:
        rank = _enough(s, 2, criterion.kept_energy or 0)
    if criterion.kohya:
        rank = max(rank, 1) + 1 if largest > KOHYA_ZERO else 1
    return min(math.ceil(rank / criterion.step) * criterion.step, most)


def _enough(s: Array, power: int, share: float) -> int:
    """The smallest rank whose singular values, to a power, add up to a share of all."""
    if share >= 1:
        return int(np.count_nonzero(s > ZERO * s.max(initial=0.0)))
    sums = np.cumsum(s**power)
    if sums.size == 0 or sums[-1] == 0:
        return 0
    return int(np.searchsorted(sums, share * sums[-1] * (1 - ROUNDING)) + 1)


def _capped(rank: int, spectra: Mapping[str, Array]) -> dict[str, int]:
    return {name: min(rank, len(s)) for name, s in spectra.items()}


def _uniform(
    spectra: Mapping[str, Array],
    criterion: Criterion,
    file_size: Callable[[Mapping[str, int]], int],
) -> dict[str, int]:
    """One rank for all: the smallest that keeps the energy, or the largest that fits the file."""
    highest = max((len(s) for s in spectra.values()), default=0)
    ranks = [*range(0, highest, criterion.step), highest]
    if criterion.rank is not None:
        return _capped(max(r for r in ranks if r <= criterion.rank), spectra)
    if criterion.size is not None:
        fitting = [r for r in ranks if file_size(_capped(r, spectra)) <= criterion.size]
        return _capped(max(fitting, default=0), spectra)
    total = sum(float((s**2).sum()) for s in spectra.values())
    for rank in ranks:
        kept = sum(float((s[:rank] ** 2).sum()) for s in spectra.values())
        if kept >= (criterion.kept_energy or 0) * total * (1 - ROUNDING):
            return _capped(rank, spectra)
    return _capped(highest, spectra)


def _greedy(
    spectra: Mapping[str, Array],
    shapes: Mapping[str, tuple[int, int]],
    criterion: Criterion,
    allocation: Allocation,
    file_size: Callable[[Mapping[str, int]], int],
) -> dict[str, int]:
    """Take the step with the best score per parameter until the bound is met."""
    cost = {name: sum(shapes[name]) for name in spectra}
    scored: list[tuple[float, int, str]] = []
    for name, s in spectra.items():
        length = float((s**2).sum()) ** 0.5 or 1.0
        score = {"relative": (s / length) ** 2, "sigma": s, "energy": s**2}[allocation]
        for start in range(0, len(s), criterion.step):
            mean = float(score[start : start + criterion.step].mean())
            scored.append((-mean / cost[name], start, name))
    ranks = dict.fromkeys(spectra, 0)
    total = sum(float((s**2).sum()) for s in spectra.values())
    kept = 0.0
    spent = 0
    taken: list[tuple[str, int]] = []
    budget = _parameters(spectra, cost, criterion, file_size)
    for _, start, name in sorted(scored):
        if budget is None and kept >= (criterion.kept_energy or 0) * total * (1 - ROUNDING):
            break
        values = spectra[name][start : start + criterion.step]
        price = len(values) * cost[name]
        if budget is not None and spent + price > budget:
            continue
        if start == ranks[name]:  # a module's ranks are taken in order
            ranks[name] += len(values)
            taken.append((name, start))
            spent += price
            kept += float((values**2).sum())
    # The header names every rank that differs, and only the file itself tells how long it gets.
    while criterion.size is not None and taken and file_size(ranks) > criterion.size:
        name, start = taken.pop()
        ranks[name] = start
    return ranks


def _parameters(
    spectra: Mapping[str, Array],
    cost: Mapping[str, int],
    criterion: Criterion,
    file_size: Callable[[Mapping[str, int]], int],
) -> int | None:
    """How many parameters may be spent, where the bound is one on size."""
    if criterion.rank is not None:
        return sum(min(criterion.rank, len(spectra[name])) * cost[name] for name in spectra)
    if criterion.size is None:
        return None
    full = {name: len(s) for name, s in spectra.items()}
    parameters = sum(full[name] * cost[name] for name in spectra)
    one = {name: min(rank, 1) for name, rank in full.items()}
    single = sum(one[name] * cost[name] for name in spectra)
    # Bytes per parameter from two files; the header of the larger one is the safe overhead.
    width = 2 if file_size(full) - file_size(one) < 3 * (parameters - single) else 4
    return max(0, (criterion.size - (file_size(full) - width * parameters)) // width)
