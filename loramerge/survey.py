"""What must see the whole adapter before anything is final: ranks, and the length of a merge."""

from collections.abc import Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace

from loramerge.adapter import LowRank
from loramerge.compute import FLOOR
from loramerge.linalg.ranks import Criterion, choose
from loramerge.linalg.scales import POLICIES, Totals, factor
from loramerge.plan import Plan
from loramerge.solve import Seen

__all__ = ["Survey", "decide"]

# How far the rounding of one module may lie above the usual.
ROUNDING_MARGIN = 1.1


class Survey(Struct, frozen=True):
    """What the first pass over all modules decided."""

    ranks: Mapping[str, int]
    scale: float
    others: Mapping[str, float]
    conditions: Mapping[str, float | None]

    def finished(self, update: LowRank, name: str) -> LowRank:
        """An update cut to its rank and brought to length, the factor's root on both sides."""
        rank = self.ranks[name]
        A, B = update.A[:rank], update.B[:, :rank]
        if self.scale == 1:
            return LowRank(A, B)
        root = abs(self.scale) ** 0.5
        return LowRank(A * root, B * (root if self.scale > 0 else -root))


def decide(plan: Plan, found: Sequence[Seen]) -> Survey:
    """Ranks and scale from what was seen of every module, in any order."""
    found = sorted(found, key=lambda one: one.name)
    ranks = dict(plan.ranks)
    if plan.recipe.criterion is not None:
        shapes = {module.name: module.model.shape for module in plan.alignment.modules}
        spectra = {s.name: s.singular_values for s in found if s.singular_values is not None}
        chosen = choose(
            spectra,
            shapes,
            _criterion(plan.recipe.criterion, plan.dtype),
            plan.recipe.settings.allocate,
            plan.file_size,
            plan.uniform,
        )
        ranks = {name: min(rank, plan.ranks[name]) for name, rank in chosen.items()}
    conditions = {one.name: one.condition for one in found}
    if not plan.scaled:
        return Survey(ranks, 1.0, {}, conditions)
    totals = _summed([one.totals for one in found if one.totals is not None])
    others: dict[str, float] = {name: factor(name, totals) for name in POLICIES}
    used = plan.recipe.scale
    scale = others[used] * plan.recipe.merge.lambda_ if isinstance(used, str) else 1.0
    return Survey(ranks, scale, others, conditions)


def _criterion(criterion: Criterion, dtype: str) -> Criterion:
    """An error bound less what rounding to the stored dtype will add to it."""
    if criterion.max_error is None:
        return criterion
    left = criterion.max_error**2 - (ROUNDING_MARGIN * FLOOR[dtype]) ** 2
    return replace(criterion, max_error=max(left, 0.0) ** 0.5)


def _summed(totals: Sequence[Totals]) -> Totals:
    """Totals of all modules added up."""
    return Totals(
        parts=tuple(map(sum, zip(*(one.parts for one in totals), strict=True))),
        target=sum(one.target for one in totals),
        result=sum(one.result for one in totals),
        inner=sum(one.inner for one in totals),
        paper=sum(one.paper or 0.0 for one in totals),
        rows=sum(one.rows for one in totals),
    )
