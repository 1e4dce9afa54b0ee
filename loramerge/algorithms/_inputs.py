"""What adapters have learned from: the covariance of every task's inputs, read off its updates."""

from collections.abc import Sequence

from loramerge.adapter import Array, LowRank, Updates
from loramerge.linalg.kernels import double, gram, like, namespace

__all__ = ["inverse", "root", "roots"]

# Directions that all updates read are what all started from, a shared initial A, and say nothing of
# inputs. They count by COMMON, and by more where less than LITTLE of an update's length is left
# besides, which may be rounding. A direction is common by where the mean of the projections on what
# each update reads is on the way from 1 / T to 1: not up to CHANCE, and wholly from SURE on.
COMMON, LITTLE = 0.2, 0.1
CHANCE, SURE = 1 / 3, 2 / 3
# What an update reads counts less where its singular value is below this share of the largest: it
# would turn with every small change of the update.
FAINT = 0.03


def roots(updates: Updates) -> tuple[Array, list[slice]]:
    """F [*b, s, n], and the rows F_t of each update: G_t = F_t^T F_t, of trace 1.

    G_t is the mean of dW^T dW over the modules that read the same input, each of trace 1, after
    what all tasks have in common there from the start has been made less.
    """
    groups = []
    for place in range(1 + (len(updates.siblings[0]) if updates.siblings else 0)):
        members = [
            factor if place == 0 else updates.siblings[t][place - 1]
            for t, factor in enumerate(updates.factors)
        ]
        groups.append(_private([_read(member) for member in members]))
    xp, share = namespace(groups[0][0]), len(groups) ** -0.5
    blocks = [xp.concat(found, axis=-2) * share for found in zip(*groups, strict=True)]
    spans, start = [], 0
    for block in blocks:
        spans.append(slice(start, start := start + block.shape[-2]))
    return xp.concat(blocks, axis=-2), spans


def _read(update: LowRank) -> Array:
    """F [*b, r, n] with F^T F = dW^T dW / ||dW||^2."""
    found: Array = root(gram(update.B), gram(update.A.mT)).mT @ double(update.A)
    return found


def _private(blocks: Sequence[Array]) -> list[Array]:
    """Each F [*b, r, n] with less of what all tasks read, of length 1 again.

    With N_t an orthonormal basis of the rows of F_t and c_k by how nearly the k-th direction p_k is
    in every N_t, C = sum_k c_k p_k p_k^T: F (I - C) + COMMON F C.
    """
    xp = namespace(blocks[0])
    N = xp.concat([_axes(block) for block in blocks], axis=-2)
    there = [like(xp.any(block != 0, axis=(-2, -1)), N) for block in blocks]
    count = xp.clip(sum(there), min=1.0)[..., None]
    values, E = xp.linalg.eigh(N @ N.mT)
    # On the way from 1 / T, in one update alone, to 1, in all.
    way = (values - 1) / xp.clip(count - 1, min=1.0)
    common = xp.clip((way - CHANCE) / (SURE - CHANCE), min=0.0, max=1.0)
    if not bool(xp.any(common > 0)):
        return list(blocks)
    mix = (E * (common / xp.clip(values, min=1.0))[..., None, :]) @ E.mT
    found = []
    for block in blocks:
        shared = ((block @ N.mT) @ mix) @ N
        own = block - shared
        length = xp.sum(own**2, axis=(-2, -1)) ** 0.5
        share = xp.clip(COMMON * LITTLE / xp.clip(length, min=COMMON * LITTLE), min=COMMON)
        mixed = own + share[..., None, None] * shared
        found.append(mixed * _shorten(xp.sum(mixed**2, axis=(-2, -1))))
    return found


def _axes(F: Array) -> Array:
    """An orthonormal basis of the rows of F; shorter vectors where these are faint. [*b, r, n]"""
    xp = namespace(F)
    values, E = xp.linalg.eigh(F @ F.mT)
    values = values + FAINT**2 * values[..., -1:]
    scale = xp.where(values > 0, values, xp.ones_like(values)) ** -0.5
    found: Array = (E * scale[..., None, :]).mT @ F
    return found


def _shorten(square: Array) -> Array:
    """What makes something of this squared length 1, and leaves nothing as it is. [*b, 1, 1]"""
    xp = namespace(square)
    found: Array = xp.where(square > 0, square, xp.ones_like(square))[..., None, None] ** -0.5
    return found


def root(G: Array, other: Array) -> Array:
    """R with R R^T = G / tr(G * other), other the Gram matrix of the factor on the other side."""
    xp = namespace(G)
    energy = xp.sum(G * other, axis=(-2, -1))
    values, E = xp.linalg.eigh(G / xp.where(energy > 0, energy, 1 + energy)[..., None, None])
    found: Array = E * (xp.clip(values, min=0.0) ** 0.5)[..., None, :]
    return found


def inverse(K: Array, size: int, ridge: float) -> tuple[Array, Array]:
    """(K + l I)^-1 with l = ridge tr(K) / size, and its condition where there are inputs. [*b]"""
    xp = namespace(K)
    energy = xp.sum(xp.linalg.diagonal(K), axis=-1) / size
    energy = xp.where(energy > 0, energy, xp.ones_like(energy)) * ridge
    eye = xp.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    values = xp.linalg.eigvalsh(K)
    least = xp.clip(values[..., -min(K.shape[-1], size)], min=0.0)
    found = xp.linalg.inv(K + energy[..., None, None] * eye)
    return found, (values[..., -1] + energy) / (least + energy)
