"""One batch of equal modules: read, method, scale, truncate. Pure of files written and order."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from loramerge.adapter import Array, LowRank, Updates
from loramerge.align import Aligned
from loramerge.batches import parts
from loramerge.compute import Compute, out_of_memory
from loramerge.errors import IncompatibleError
from loramerge.linalg.calibrations import calibrated, prepared
from loramerge.linalg.factors import Grams, compare, concat, grams, norm, scale, summed
from loramerge.linalg.kernels import double, kernels, like, namespace
from loramerge.linalg.scales import Totals
from loramerge.linalg.spectrum import Spectrum, decompose
from loramerge.plan import Plan
from loramerge.reading import read_updates

__all__ = [
    "Seen",
    "Solved",
    "Target",
    "finished",
    "halving",
    "merged",
    "read_target",
    "solve",
    "weighted_sum",
]

Result = TypeVar("Result")


class Target(Struct, frozen=True):
    """The exact weighted sum of one module, with its Gram matrices where they are known."""

    update: LowRank
    known: Grams | None = None


class Seen(Struct, frozen=True):
    """What is kept of every module until the end: small.

    Singular values and totals are there where ranks or the scale follow from the whole adapter.
    """

    name: str
    singular_values: Array | None
    totals: Totals | None
    condition: float | None


class Solved(Struct, frozen=True):
    """The result for one module: numpy factors, no batch dimension.

    Where ranks are not decided yet, the update has every rank it may keep, in decreasing order.
    `target` is what the result will be measured against, where it is at hand.
    """

    name: str
    update: LowRank
    target: Target | None
    seen: Seen


def solve(
    plan: Plan, compute: Compute, batch: Sequence[Aligned], known: Any = None
) -> list[Solved]:
    """The results of a batch; `known` is what the method's census found."""
    return halving(partial(_solve, plan, compute, known), compute, batch)


def halving(
    work: Callable[[Sequence[Aligned]], list[Result]], compute: Compute, batch: Sequence[Aligned]
) -> list[Result]:
    """What `work` makes of a batch. One too large for the device is halved, down to one module."""
    try:
        return work(batch)
    except Exception as error:
        if "LinAlgError" in type(error).__name__:
            raise IncompatibleError(
                f"{batch[0].name}: its numbers are too large for {compute.dtype}.",
                "--compute-dtype float64 has room for them",
            ) from None
        if len(batch) == 1 or not out_of_memory(error):
            raise
    half = len(batch) // 2
    return halving(work, compute, batch[:half]) + halving(work, compute, batch[half:])


def _solve(plan: Plan, compute: Compute, known: Any, batch: Sequence[Aligned]) -> list[Solved]:
    found, shared = [], dict[Any, Any]()
    for part in parts(plan, batch):
        updates = replace(read_updates(plan, compute, part, shared), known=known)
        found += merged(plan, compute, part, updates)
    return found


def merged(
    plan: Plan, compute: Compute, batch: Sequence[Aligned], updates: Updates
) -> list[Solved]:
    """What the method makes of a batch that was read."""
    method, calibration = plan.recipe.method, plan.recipe.merge.calibrate
    result = method.rule(prepared(calibration, updates), plan.options)
    result = calibrated(calibration, updates, result, method.orthogonal(plan.options))
    target = weighted_sum(plan, updates)
    if plan.exact and isinstance(result, LowRank) and result is not target.update:
        target = Target(result, grams(result))
    return finished(plan, compute, batch, updates, target, result)


def finished(
    plan: Plan,
    compute: Compute,
    batch: Sequence[Aligned],
    updates: Updates,
    target: Target,
    result: LowRank | Spectrum,
) -> list[Solved]:
    """What a method made of a batch, brought to the length and rank that are known already."""
    conditions = result.condition if isinstance(result, Spectrum) else None
    result = _rescaled(plan, updates, result)
    totals: list[Totals | None] = [None] * len(batch)
    if plan.scaled:
        totals = [*_totals(plan, batch[0], updates, target, result)]
    limit = plan.ranks[batch[0].name]
    values: list[Array | None] = [None] * len(batch)
    if plan.recipe.criterion is not None or isinstance(result, Spectrum) or result.rank > limit:
        same = target.known if result is target.update else None
        spectrum = result if isinstance(result, Spectrum) else decompose(result, same)
        result = spectrum.truncated(limit)
        values = list(compute.unload(spectrum.s))
    A, B = compute.unload(result.A), compute.unload(result.B)
    return [
        Solved(
            name=module.name,
            update=LowRank(A[i], B[i]),
            target=_at(target, i) if compute.on_cpu else None,
            seen=Seen(
                module.name,
                values[i],
                totals[i],
                None if conditions is None else float(conditions[i]),
            ),
        )
        for i, module in enumerate(batch)
    ]


def weighted_sum(plan: Plan, updates: Updates) -> Target:
    """The exact weighted sum of a batch, or what else the method is measured against."""
    weights = _counted(plan, updates.weights, updates.positions)
    return Target(*summed(replace(updates, weights=weights)))


def _counted(plan: Plan, weights: Sequence[float], positions: Sequence[int]) -> tuple[float, ...]:
    """The weights in what a result is measured against."""
    alone = plan.recipe.method.removes
    return tuple(
        0.0 if alone and position > 0 else weight
        for weight, position in zip(weights, positions, strict=True)
    )


def _at(target: Target, i: int) -> Target:
    """One item of a batch of targets."""
    update, known = target.update, target.known
    return Target(LowRank(update.A[i], update.B[i]), known and Grams(B=known.B[i], A=known.A[i]))


def _rescaled(plan: Plan, updates: Updates, result: LowRank | Spectrum) -> LowRank | Spectrum:
    """The factors known before the whole adapter is: --lambda, a numeric --scale, the paper's.

    Where the length follows from the whole adapter, --lambda must wait for it.
    """
    recipe = plan.recipe
    factor = 1.0 if plan.scaled else recipe.merge.lambda_
    if isinstance(recipe.scale, float | int):
        factor *= recipe.scale
    elif recipe.scale == "paper" and recipe.method.paper_scale is not None:
        factor *= recipe.method.paper_scale(updates, plan.options)
    if factor == 1:
        return result
    return result.scaled(factor) if isinstance(result, Spectrum) else scale(result, factor)


def _totals(
    plan: Plan,
    model: Aligned,
    updates: Updates,
    target: Target,
    result: LowRank | Spectrum,
) -> list[Totals]:
    """What the scale policies need of each module: norms of the parts, the sum and the result."""
    square, length, inner = _lengths(target, result)
    published = plan.recipe.method.paper_scale
    paper = published(updates, plan.options) if published else 1.0
    norms = iter(_squares(updates))
    parts = [None if member is None else next(norms) for member in model.members]
    return [
        Totals(
            parts=tuple(0.0 if part is None else float(part[i]) for part in parts),
            target=float(square[i]),
            result=float(length[i]),
            inner=float(inner[i]),
            paper=paper**2 * float(length[i]),
            rows=float(model.model.shape[0]),
        )
        for i in range(square.shape[0])
    ]


def _lengths(target: Target, result: LowRank | Spectrum) -> tuple[Array, Array, Array]:
    """||target||^2, ||result||^2 and <result, target>, of the result before it is cut. All [b]"""
    if isinstance(result, Spectrum):
        return norm(target.update, target.known) ** 2, *(result.whole or _whole(target, result))
    near = compare(target.update, result, target.known)
    return near.target, near.result, near.inner


def _whole(target: Target, result: Spectrum) -> tuple[Array, Array]:
    """||result||^2 and <result, target>, with nothing multiplied out. Both [b]"""
    A, B = target.update.A, target.update.B
    product, xp = kernels(A).inner, namespace(A)
    left = result.u.mT @ double(product(result.left, B))
    right = result.vh @ double(product(like(result.right, A).mT, A.mT))
    return xp.sum(result.s**2, axis=-1), xp.sum(result.s * xp.sum(left * right, axis=-1), axis=-1)


def _squares(updates: Updates) -> Iterator[Array]:
    """||w_t dW_t||^2 of each update. [b]"""
    known, start = summed(updates)[1], 0
    for factor, weight in zip(updates.factors, updates.weights, strict=True):
        own = slice(start, start := start + factor.rank)
        part = Grams(B=known.B[..., own, own], A=known.A[..., own, own])
        yield norm(scale(factor, weight), part) ** 2


def read_target(plan: Plan, module: Aligned, wide: bool = False) -> Target:
    """What one module is measured against, as factors, straight from the files."""
    positions = [at for at, member in enumerate(module.members) if member is not None]
    updates = [plan.adapters[at].read(module.name, wide) for at in positions]
    weights = [module.weights[at] for at in positions]
    return Target(concat(updates, _counted(plan, weights, positions)))
