"""How many ranks each module of a result keeps, from its singular values."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from loramerge._lazy import np
from loramerge.adapter import Array

__all__ = ["Allocation", "Criterion", "choose"]

# Singular values below this share of the largest are the rounding of zeros.
ZERO = 1e-12

Allocation: TypeAlias = Literal["uniform", "relative", "sigma", "energy"]


@dataclass(frozen=True, slots=True)
class Criterion:
    """What bounds the ranks: exactly one of a rank, an energy share, an error, or bytes.

    rank: ranks per module on average; energy: least share of squared singular values kept;
    max_error: largest relative Frobenius error; size: bytes of the written file.
    """

    rank: int | None = None
    energy: float | None = None
    max_error: float | None = None
    size: int | None = None

    @property
    def kept_energy(self) -> float | None:
        """The least energy share that meets the bound: 1 - error^2."""
        return 1 - self.max_error**2 if self.max_error is not None else self.energy


def choose(
    spectra: Mapping[str, Array],
    shapes: Mapping[str, tuple[int, int]],
    criterion: Criterion,
    allocation: Allocation | None,
    file_size: Callable[[Mapping[str, int]], int],
    uniform: bool,
) -> dict[str, int]:
    """Ranks by module.

    Without an allocation, energy and max_error hold in every module on its own. With one they hold
    for the adapter as a whole, and ranks are taken greedily by score per parameter: `relative`
    (s / ||dW||)^2, `sigma` s, `energy` s^2, or one rank for all (`uniform`). `file_size` tells the
    bytes of a file with given ranks. `uniform` asks for one stored rank: a per-module choice then
    becomes its largest. A module may end with rank 0.
    """
    energy = criterion.kept_energy
    if allocation is None and energy is not None:
        ranks = {name: _enough(s, energy) for name, s in spectra.items()}
        return _level(ranks, spectra) if uniform else ranks
    if uniform or allocation in (None, "uniform"):
        return _uniform(spectra, criterion, file_size)
    assert allocation is not None
    return _greedy(spectra, shapes, criterion, allocation, file_size)


def _enough(s: Array, energy: float) -> int:
    """The smallest rank whose squared singular values add up to a share of the whole."""
    if energy >= 1:
        return int(np.count_nonzero(s > ZERO * s.max(initial=0.0)))
    squares = np.cumsum(s**2)
    if squares.size == 0 or squares[-1] == 0:
        return 0
    return int(np.searchsorted(squares, energy * squares[-1] * (1 - 1e-12)) + 1)


def _level(ranks: Mapping[str, int], spectra: Mapping[str, Array]) -> dict[str, int]:
    highest = max(ranks.values(), default=0)
    return {name: min(highest, len(spectra[name])) for name in ranks}


def _capped(rank: int, spectra: Mapping[str, Array]) -> dict[str, int]:
    return {name: min(rank, len(s)) for name, s in spectra.items()}


def _uniform(
    spectra: Mapping[str, Array],
    criterion: Criterion,
    file_size: Callable[[Mapping[str, int]], int],
) -> dict[str, int]:
    """One rank for all: the smallest that keeps the energy, or the largest that fits the file."""
    highest = max((len(s) for s in spectra.values()), default=0)
    if criterion.rank is not None:
        return _capped(criterion.rank, spectra)
    if criterion.size is not None:
        fitting = [
            r for r in range(highest + 1) if file_size(_capped(r, spectra)) <= criterion.size
        ]
        return _capped(max(fitting, default=0), spectra)
    total = sum(float((s**2).sum()) for s in spectra.values())
    for rank in range(highest + 1):
        kept = sum(float((s[:rank] ** 2).sum()) for s in spectra.values())
        if kept >= (criterion.kept_energy or 0) * total * (1 - 1e-12):
            return _capped(rank, spectra)
    return _capped(highest, spectra)


def _greedy(
    spectra: Mapping[str, Array],
    shapes: Mapping[str, tuple[int, int]],
    criterion: Criterion,
    allocation: Allocation,
    file_size: Callable[[Mapping[str, int]], int],
) -> dict[str, int]:
    """Take the rank with the best score per parameter until the bound is met."""
    cost = {name: sum(shapes[name]) for name in spectra}
    scored: list[tuple[float, int, str]] = []
    for name, s in spectra.items():
        length = float((s**2).sum()) ** 0.5 or 1.0
        score = {"relative": (s / length) ** 2, "sigma": s, "energy": s**2}[allocation]
        scored += [(-float(value) / cost[name], index, name) for index, value in enumerate(score)]
    ranks = dict.fromkeys(spectra, 0)
    total = sum(float((s**2).sum()) for s in spectra.values())
    kept = 0.0
    spent = 0
    taken: list[str] = []
    budget = _parameters(spectra, cost, criterion, file_size)
    for _, index, name in sorted(scored):
        if budget is None and kept >= (criterion.kept_energy or 0) * total * (1 - 1e-12):
            break
        if budget is not None and spent + cost[name] > budget:
            continue
        if index == ranks[name]:  # a module's ranks are taken in order
            ranks[name] += 1
            taken.append(name)
            spent += cost[name]
            kept += float(spectra[name][index]) ** 2
    # The header names every rank that differs, and only the file itself tells how long it gets.
    while criterion.size is not None and taken and file_size(ranks) > criterion.size:
        ranks[taken.pop()] -= 1
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
