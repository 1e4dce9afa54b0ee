"""Updates as long vectors: what a merge of the whole needs is in their inner products alone."""

from loramerge.adapter import Array, LowRank, Updates
from loramerge.linalg.factors import concat, inner_products
from loramerge.linalg.kernels import like, namespace

__all__ = ["angles", "combined", "weights"]


def angles(updates: Updates) -> tuple[Array, Array]:
    """The lengths ||dW_t|| [*b, T] of all adapters' updates, and their cosines [*b, T, T].

    An update that is zero, as where an adapter lacks the module, is at right angles to all, itself
    included. Both in float64.
    """
    G = inner_products(updates.factors)
    xp = namespace(G)
    there = [[float(place == own) for own in updates.positions] for place in range(updates.count)]
    spread = xp.asarray(there, dtype=G.dtype, device=G.device)
    G = spread @ G @ spread.mT
    lengths = xp.clip(xp.linalg.diagonal(G), min=0.0) ** 0.5
    inverse = like(lengths > 0, G) / xp.where(lengths > 0, lengths, 1 + lengths)
    return lengths, G * inverse[..., :, None] * inverse[..., None, :]


def weights(updates: Updates, model: Array) -> Array:
    """The weight of every adapter, 0 where it lacks the module; dtype and device of model. [T]"""
    found = [0.0] * updates.count
    for position, weight in zip(updates.positions, updates.weights, strict=True):
        found[position] = weight
    every: Array = namespace(model).asarray(found, dtype=model.dtype, device=model.device)
    return every


def combined(updates: Updates, coefficients: Array) -> LowRank:
    """sum_t c_t dW_t, exactly: of rank sum_t r_t. coefficients [*b, T]"""
    return concat(updates.factors, [coefficients[..., place] for place in updates.positions])
