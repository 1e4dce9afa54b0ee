"""What is done about directions that several updates share, before or after any merge."""

from collections.abc import Mapping
from typing import Literal, TypeAlias

from msgspec.structs import replace

from loramerge.adapter import Array, LowRank, Updates
from loramerge.linalg.factors import norm, scale
from loramerge.linalg.kernels import double, kernels, like, namespace
from loramerge.linalg.spectrum import Spectrum, basis, decompose, lift

__all__ = ["PAPERS", "CalibrationName", "calibrated", "prepared"]

CalibrationName: TypeAlias = Literal["pico", "svc"]
PAPERS: Mapping[CalibrationName, str] = {"pico": "arXiv:2604.16826", "svc": "arXiv:2602.05536"}

# What an update has along a direction of the merge counts as this share of what the merge has
# there, if it is less: the quotient of the two would leap between any two values where it is none.
FAINT = 0.01


def prepared(name: CalibrationName | None, updates: Updates) -> Updates:
    """The updates that a method is to see: pico holds back the directions of output they share.

    [w_1 dW_1 .. w_T dW_T] = U S V^T, e_k = s_k^2 / sum s^2: each update becomes
    dW_t + U diag(a - 1) U^T dW_t, a_k = 1 / (1 + (T - 1) e_k) (Pico, arXiv:2604.16826). T counts
    the adapters that have the module.
    """
    if name != "pico" or len(updates.factors) == 1:
        return updates
    xp = namespace(updates.factors[0].B)
    spectra = [decompose(factor) for factor in updates.factors]
    sides = [
        lift(double(one.left), one.u * (one.s * abs(weight))[..., None, :])
        for one, weight in zip(spectra, updates.weights, strict=True)
    ]
    whole = basis(xp.concat(sides, axis=-1))
    u, s, _ = kernels(whole.coefficients).svd(whole.coefficients)
    total = xp.sum(s**2, axis=-1, keepdims=True)
    share = s**2 / xp.where(total > 0, total, xp.ones_like(total))
    less = 1 / (1 + (len(sides) - 1) * share) - 1
    U = lift(double(whole.columns), whole.mix @ u)
    return replace(updates, factors=tuple(_held_back(one, U, less) for one in updates.factors))


def _held_back(update: LowRank, U: Array, less: Array) -> LowRank:
    B = double(update.B)
    return LowRank(A=update.A, B=like(B + (U * less[..., None, :]) @ (U.mT @ B), update.B))


def calibrated(
    name: CalibrationName | None,
    updates: Updates,
    result: LowRank | Spectrum,
    orthogonal: bool = False,
) -> LowRank | Spectrum:
    """What becomes of the result of a method; `updates` are those before anything was held back.

    pico brings it to the mean length of the weighted updates, module by module. svc divides each
    of its singular values by how often the updates add up along that direction: 1 / T at least, or
    1 where the method made the updates orthogonal, so that none is lengthened.
    """
    if name == "pico":
        return _as_long(updates, result)
    least = 1.0 if orthogonal else 1 / len(updates.factors)
    return _unshared(updates, result, least) if name == "svc" else result


def _as_long(updates: Updates, result: LowRank | Spectrum) -> LowRank | Spectrum:
    norms = [
        norm(factor) * abs(weight)
        for factor, weight in zip(updates.factors, updates.weights, strict=True)
    ]
    mean = sum(norms[1:], start=norms[0]) / len(norms)
    xp = namespace(mean)
    if isinstance(result, LowRank):
        length = norm(result)
        return scale(result, mean / xp.where(length > 0, length, xp.ones_like(length)))
    square, inner = result.whole or (xp.sum(result.s**2, axis=-1), None)
    factor = mean / xp.where(square > 0, square, xp.ones_like(square)) ** 0.5
    whole = None if inner is None else (square * factor**2, inner * factor)
    return replace(result, s=result.s * factor[..., None], whole=whole)


def _unshared(updates: Updates, result: LowRank | Spectrum, least: float) -> Spectrum:
    """Singular values divided by eta_j = mean_t max(c_t, least) (SVC, arXiv:2602.05536).

    c_t = <p, p_t> / ||p_t||^2, where p = u_j^T W and p_t = u_j^T w_t dW_t: how often the merge has
    what update t has along u_j.
    """
    found = decompose(result) if isinstance(result, LowRank) else result
    xp = namespace(found.s)
    left, right = double(found.left).mT, double(found.right)
    times = []
    for factor, weight in zip(updates.factors, updates.weights, strict=True):
        A, B = double(factor.A), double(factor.B) * weight
        P = found.u.mT @ (left @ B)
        inner = found.s * xp.sum((P @ (A @ right.mT)) * found.vh, axis=-1)
        square = xp.maximum(xp.sum((P @ (A @ A.mT)) * P, axis=-1), (FAINT * found.s) ** 2)
        quotient = inner / xp.where(square > 0, square, xp.ones_like(square))
        times.append(xp.clip(quotient, min=least))
    s = found.s * len(times) / sum(times[1:], start=times[0])
    order = xp.argsort(-s, axis=-1, stable=True)
    columns = xp.broadcast_to(order[..., None, :], found.u.shape)
    rows = xp.broadcast_to(order[..., :, None], found.vh.shape)
    return replace(
        found,
        whole=None,
        u=xp.take_along_axis(found.u, columns, axis=-1),
        s=xp.take_along_axis(s, order, axis=-1),
        vh=xp.take_along_axis(found.vh, rows, axis=-2),
    )
