"""What adapters have learned from: the covariance of every task's inputs, read off its updates."""

from collections.abc import Sequence
from typing import NamedTuple

from loramerge.adapter import Array, LowRank, Updates
from loramerge.linalg.kernels import double, gram, like, namespace

__all__ = ["Inputs", "answers", "diagonal", "inputs", "inverse", "root"]

# Directions that all updates read are what all started from, a shared initial A, and say nothing of
# inputs. They count by COMMON, and by more where less than LITTLE of an update's length is left
# besides, which may be rounding. A direction is common by where the mean of the projections on what
# each update reads is on the way from 1 / T to 1: not up to CHANCE, and wholly from SURE on.
COMMON, LITTLE = 0.2, 0.1
CHANCE, SURE = 1 / 3, 2 / 3
# What an update reads counts less where its singular value is below this share of the largest: it
# would turn with every small change of the update.
FAINT = 0.03


class Inputs(NamedTuple):
    """G_t = F_t^T F_t of every task, of trace 1: F = mix @ rows.

    rows [*b, k, n] are all A, of the updates themselves and of each sibling, in their order;
    products [*b, k, k] their inner products, mix [*b, k, k] small, and owners [k, T] tells which
    update a row is of, in `rows` as in F; `own` are those of the updates themselves.
    Nothing but `rows`, in the dtype of the updates, is as wide as a module.
    """

    rows: Array
    products: Array
    mix: Array
    owners: Array
    own: slice

    def gram(self) -> Array:
        """F F^T. [*b, k, k]"""
        found: Array = self.mix @ self.products @ self.mix.mT
        return found


def inputs(updates: Updates, ridge: float) -> tuple[Inputs, Array, Array]:
    """What every task reads, by what its updates do; (F F^T + l I)^-1, and its condition. [*b]

    G_t is the mean of dW^T dW over the modules that read the same input, each of trace 1, after
    what all tasks have in common there from the start has been made less. l = ridge tr(H) / n.
    """
    groups = _readers(updates)
    ranks = [[one.rank for one in group] for group in groups]
    before = sum(map(sum, ranks[: updates.place]))
    own = slice(before, before + sum(ranks[updates.place]))
    key = ("inputs", ridge, *(id(one) for group in groups for one in group))
    if key not in updates.shared:
        read = _inputs(groups, ranks)
        found = read, *inverse(read.gram(), read.rows.shape[-1], ridge)
        updates.shared[key] = found, groups  # which keeps these, and with them their ids
    (read, solved, condition), _ = updates.shared[key]
    return read._replace(own=own), solved, condition


def _readers(updates: Updates) -> list[tuple[LowRank, ...]]:
    """The updates of every module that reads this input, in the order of these."""
    groups = [*zip(*updates.siblings, strict=True)] if updates.siblings else []
    groups.insert(updates.place, updates.factors)
    return groups


def _inputs(groups: Sequence[Sequence[LowRank]], ranks: Sequence[Sequence[int]]) -> Inputs:
    """The same for all modules that read one input."""
    xp = namespace(groups[0][0].A)
    rows = xp.concat([one.A for group in groups for one in group], axis=-2)
    products, start, mix = gram(double(rows).mT), 0, []
    for group in groups:
        spans = []
        for one in group:
            spans.append(slice(start, start := start + one.rank))
        known = [products[..., span, span] for span in spans]
        turns = [root(gram(double(one.B)), K).mT for one, K in zip(group, known, strict=True)]
        whole = slice(spans[0].start, start)
        mix.append(_private(turns, products[..., whole, whole]))
    owners = _owners(ranks, products)
    # A module that an adapter lacks has rank 0 there.
    counts = [[float(sum(rank > 0 for rank in row)) for row in zip(*ranks, strict=True)]]
    share = owners @ xp.asarray(counts, dtype=owners.dtype, device=owners.device).mT ** -0.5
    return Inputs(rows, products, share * diagonal(mix), owners, slice(0, 0))


def answers(read: Inputs, solved: Array) -> Array:
    """X [*b, s, k] with X @ rows the A of dW_t G_t (H + l I)^-1 of all updates, H = F^T F.

    In thin space (Woodbury): F_t (F^T F + l I)^-1 is rows of (F F^T + l I)^-1 F, whose first factor
    is `solved`.
    """
    E = read.owners
    same = (E @ E.mT)[read.own, :]
    found: Array = (read.products[..., read.own, :] @ read.mix.mT * same) @ solved @ read.mix
    return found


def _private(turns: Sequence[Array], K: Array) -> Array:
    """F [*b, k, k] over rows of products K, with less of what all tasks read; each F_t of length 1.

    F_t = turn_t rows_t. With N_t an orthonormal basis of the rows of F_t and c_k by how nearly the
    k-th direction p_k is in every N_t, C = sum_k c_k p_k p_k^T: F (I - C) + COMMON F C.
    """
    xp = namespace(K)
    F, start, axes = diagonal(turns), 0, []
    products = F @ K @ F.mT
    for turn in turns:
        span = slice(start, start := start + turn.shape[-1])
        axes.append(_axes(products[..., span, span]))
    N = diagonal(axes) @ F
    count = sum(like(xp.any(turn != 0, axis=(-2, -1)), K) for turn in turns)
    values, E = xp.linalg.eigh(N @ K @ N.mT)
    # On the way from 1 / T, in one update alone, to 1, in all.
    way = (values - 1) / xp.clip(count - 1, min=1.0)[..., None]
    common = xp.clip((way - CHANCE) / (SURE - CHANCE), min=0.0, max=1.0)
    if not bool(xp.any(common > 0)):
        return F
    part = (E * (common / xp.clip(values, min=1.0))[..., None, :]) @ E.mT
    shared = (F @ K @ N.mT) @ part @ N
    owners = _owners([[turn.shape[-1] for turn in turns]], K)
    left = _lengths(F - shared, K, owners)
    share = xp.clip(COMMON * LITTLE / xp.clip(left, min=COMMON * LITTLE), min=COMMON)
    mixed = F - shared + share[..., None] * shared
    length = _lengths(mixed, K, owners)
    found: Array = mixed / xp.where(length > 0, length, xp.ones_like(length))[..., None]
    return found


def _owners(ranks: Sequence[Sequence[int]], model: Array) -> Array:
    """Which update a row is of, 1 there and 0 elsewhere. [k, T]"""
    owner = [t for group in ranks for t, rank in enumerate(group) for _ in range(rank)]
    table = [[float(t == one) for t in range(len(ranks[0]))] for one in owner]
    found: Array = namespace(model).asarray(table, dtype=model.dtype, device=model.device)
    return found


def _lengths(F: Array, K: Array, owners: Array) -> Array:
    """||F_t|| of the update that each row of F, over rows of products K, belongs to. [*b, k]"""
    xp = namespace(K)
    # As a row for each item, which is multiplied alike in a batch of any size.
    squares = xp.sum((F @ K) * F, axis=-1)[..., None, :]
    found: Array = xp.clip(squares @ owners @ owners.mT, min=0.0)[..., 0, :] ** 0.5
    return found


def _axes(K: Array) -> Array:
    """T with T F an orthonormal basis of the rows of F; shorter vectors where these are faint."""
    xp = namespace(K)
    values, E = xp.linalg.eigh(K)
    values = values + FAINT**2 * values[..., -1:]
    scale = xp.where(values > 0, values, xp.ones_like(values)) ** -0.5
    found: Array = (E * scale[..., None, :]).mT
    return found


def diagonal(blocks: Sequence[Array]) -> Array:
    """Matrices [*b, r, c] along a diagonal, zeros beside them."""
    xp, first = namespace(blocks[0]), blocks[0]
    total, start, rows = sum(int(block.shape[-1]) for block in blocks), 0, []
    for block in blocks:
        shape = (*block.shape[:-1], start), (*block.shape[:-1], total - start - block.shape[-1])
        left, right = (xp.zeros(one, dtype=first.dtype, device=first.device) for one in shape)
        rows.append(xp.concat([left, block, right], axis=-1))
        start += int(block.shape[-1])
    found: Array = xp.concat(rows, axis=-2)
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
