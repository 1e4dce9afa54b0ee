"""Which modules are computed together."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from loramerge.align import Aligned
from loramerge.compute import Compute
from loramerge.plan import Plan
from loramerge.reading import place_of, readers_beside, role_of
from loramerge.siblings import readers

__all__ = ["batches", "parts"]


def batches(plans: Sequence[Plan], compute: Compute) -> Iterator[tuple[Aligned, ...]]:
    """Modules in groups that can be computed together: same shape, ranks, scalings, weights.

    The plans are of the same modules. Where the first one's method looks at siblings, these come
    with them: `parts` tells apart what is computed together.
    """
    plan = plans[0]
    groups: dict[object, list[list[Aligned]]] = {}
    for family in _families(plan):
        groups.setdefault(tuple(_key(plan, one) for one in family), []).append(family)
    for group in groups.values():
        size = compute.batch(max(_entries(plan, one) for plan in plans for one in group[0]))
        for start in range(0, len(group), size):
            yield tuple(chain.from_iterable(group[start : start + size]))


def parts(plan: Plan, batch: Sequence[Aligned]) -> list[list[Aligned]]:
    """What of a batch can be computed together: same shape, ranks, scalings, weights.

    Where the method looks at siblings, these have the same ranks too, and all modules do the same.
    """
    found: dict[object, list[Aligned]] = {}
    for module in batch:
        found.setdefault(_key(plan, module), []).append(module)
    return list(found.values())


def _families(plan: Plan) -> Iterable[list[Aligned]]:
    """The modules that read one input where the method looks at siblings, or each by itself."""
    modules = {module.name: module for module in plan.alignment.modules}
    if not plan.recipe.method.siblings:
        return ([module] for module in modules.values())
    found = {readers(name, modules.__contains__): None for name in modules}
    return ([modules[name] for name in names] for names in found)


def _key(plan: Plan, module: Aligned) -> object:
    """What is the same for modules that are computed together."""
    members = tuple(m and (m.rank, m.scaling) for m in module.members)
    if not plan.recipe.method.siblings:
        return module.model.shape, members, module.weights
    beside = tuple(
        tuple(s and s.rank for s in readers_beside(plan, module, place))
        for place in range(len(members))
    )
    does = role_of(plan, module), place_of(plan, module)
    return module.model.shape, members, module.weights, beside, does


def _entries(plan: Plan, module: Aligned) -> int:
    """How many numbers a module is while it is computed."""
    m, n = module.model.shape
    return m * n if plan.dense else (m + n) * sum(module.ranks)
