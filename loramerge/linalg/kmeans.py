"""k-means of many small problems side by side, from the inner products of their points alone.

Modules give thousands of problems of a few dozen points. All restarts of all of a batch advance
together, the same on every kind of array; scikit-learn, whose labels these are, spends more time
on being imported and called than on such problems.
"""

import math

from loramerge._lazy import np
from loramerge.adapter import Array
from loramerge.linalg.kernels import like, namespace

__all__ = ["kmeans", "starts"]

# Points nearer than this share of the longest one, squared, count as the same point.
SAME = 1e-12
# scikit-learn's bound on Lloyd's iterations.
ITERATIONS = 300
# Totals nearer than this share of each other are equal: which is smaller, rounding would decide.
# Such ties are common. Of two points that are each other's nearest, either one covers both.
TIE = 1e-9


def kmeans(G: Array, k: int, seed: int, restarts: int) -> tuple[Array, Array]:
    """Labels [*b, p] and inertia [*b] of points whose inner products are G [*b, p, p].

    Lloyd's algorithm from greedy k-means++ starts; of the restarts the one of least inertia. Like
    scikit-learn's KMeans, but for three things: points at the origin carry no weight, points with
    at most k distinct places are labelled by their place, and an empty cluster that moves to the
    farthest point leaves that point in the mean of its former cluster until the next assignment.
    """
    xp = namespace(G)
    *batch, count, _ = G.shape
    G = xp.reshape(G, (-1, count, count))
    live = xp.linalg.diagonal(G) > 0
    between = _squares(G)
    labels, distinct = _places(G, between, live)
    inertia = 0 * G[:, 0, 0]
    hard = distinct > k
    if bool(xp.any(hard)):
        chosen = xp.nonzero(hard)[0]
        inner, squares, alive = (xp.take(x, chosen, axis=0) for x in (G, between, live))
        found, least = _lloyd(inner, squares, alive, k, seed, restarts)
        turn = xp.clip(xp.cumulative_sum(xp.astype(hard, xp.int64)) - 1, min=0)
        labels = xp.where(hard[:, None], xp.take(found, turn, axis=0), labels)
        inertia = xp.where(hard, xp.take(least, turn), inertia)
    return xp.reshape(labels, (*batch, count)), xp.reshape(inertia, tuple(batch))


def _places(G: Array, between: Array, live: Array) -> tuple[Array, Array]:
    """Each live point numbered by its first equal, [b, p], and how many numbers there are, [b]."""
    xp = namespace(G)
    longest = xp.max(xp.linalg.diagonal(G), axis=-1)
    same = (between <= SAME * longest[:, None, None]) & live[:, None, :]
    first = xp.argmax(xp.astype(same, xp.int8), axis=-1)
    new = live & (first == xp.arange(G.shape[-1], device=G.device))
    number = xp.cumulative_sum(xp.astype(new, xp.int64), axis=-1) - 1
    labels = xp.take_along_axis(number, first, axis=-1) * xp.astype(live, xp.int64)
    return labels, xp.sum(xp.astype(new, xp.int64), axis=-1)


def _lloyd(
    G: Array, between: Array, live: Array, k: int, seed: int, restarts: int
) -> tuple[Array, Array]:
    """k-means with more than k distinct live points: labels [b, p], inertia [b].

    A centre is a mix of points, a column of W [b, p, n, k]: x . c = G W, and c . c = W^T G W.
    """
    xp = namespace(G)
    clusters = xp.arange(k, device=G.device)
    points = xp.arange(G.shape[-1], device=G.device)
    weight = like(live, G)[:, :, None, None]
    length = xp.linalg.diagonal(G)[:, :, None]
    W = like(starts(between, live, k, seed, restarts)[:, None, ...] == points[:, None, None], G)
    labels = -xp.ones(W.shape[:-1], dtype=xp.int64, device=G.device)
    for _ in range(ITERATIONS):
        inner = _applied(G, W)
        apart = xp.sum(W * inner, axis=1)[:, None, ...] - 2 * inner
        before, labels = labels, xp.argmin(apart, axis=-1)
        if bool(xp.all(before == labels)):
            break
        members = like(labels[..., None] == clusters, G) * weight
        sizes = xp.sum(members, axis=1)
        W = members / xp.clip(sizes, min=1.0)[:, None, ...]
        if bool(xp.any(sizes == 0)):
            own = (length + xp.min(apart, axis=-1)) * weight[..., 0]
            W = _relocated(W, sizes == 0, own)
    apart = xp.take_along_axis(apart, labels[..., None], axis=-1)[..., 0]
    inertia = xp.sum((length + apart) * weight[..., 0], axis=1)
    best = xp.argmin(inertia, axis=-1)
    labels = xp.take_along_axis(labels, best[:, None, None], axis=-1)[..., 0]
    return labels, xp.clip(xp.min(inertia, axis=-1), min=0.0)


def _applied(G: Array, W: Array) -> Array:
    """G W, of every restart in one product. [b, p, n, k]"""
    xp = namespace(G)
    flat = xp.reshape(W, (*W.shape[:2], -1))
    product: Array = xp.reshape(G @ flat, W.shape)
    return product


def _relocated(W: Array, empty: Array, own: Array) -> Array:
    """Centres with empty clusters moved to the points farthest from their own centre.

    W [b, p, n, k], empty [b, n, k], own [b, p, n] the squared distance from a point's centre.
    """
    xp = namespace(W)
    farthest = xp.argsort(-own, axis=1, stable=True)
    turn = xp.cumulative_sum(xp.astype(empty, xp.int64), axis=-1) - 1
    rank = xp.argsort(farthest, axis=1)  # of each point: how many are farther
    chosen = like(rank[..., None] == turn[:, None, ...], W)
    moved: Array = xp.where(empty[:, None, ...], chosen, W)
    return moved


def starts(between: Array, live: Array, k: int, seed: int, restarts: int) -> Array:
    """Indices [b, n, k] of greedy k-means++ (Arthur and Vassilvitskii 2007, section 6).

    Of 2 + log k candidates, drawn with probability in proportion to the squared distance from the
    nearest centre so far, each step takes the one that lowers the total most; the first of equals.
    But for such ties these are the starts scikit-learn finds with this random_state. `between` are
    squared distances [b, p, p], with more than k distinct points among the `live` [b, p]. Every
    item of a batch draws the same random numbers, on any device, so that its result depends on
    nothing beside it.
    """
    xp = namespace(between)
    trials = 2 + int(math.log(k))
    numbers = np.random.RandomState(seed).random_sample((restarts, 1 + (k - 1) * trials))
    draws = xp.asarray(numbers, dtype=between.dtype, device=between.device)
    alive = like(live, between)[:, None, :]
    between = between * alive
    item = xp.arange(between.shape[0], device=between.device)[:, None]
    run = xp.arange(restarts, device=between.device)
    nearest = xp.broadcast_to(alive, (between.shape[0], restarts, between.shape[1]))
    chosen = [_drawn(nearest, draws[:, :1])[..., 0]]
    nearest = _rows(between, chosen[0])
    for step in range(1, k):
        candidates = _drawn(nearest, draws[:, 1 + (step - 1) * trials :][:, :trials])
        nearer = xp.minimum(nearest[:, :, None, :], _rows(between, candidates))
        total = xp.sum(nearer, axis=-1)
        least = total <= (1 + TIE) * xp.min(total, axis=-1, keepdims=True)
        best = xp.argmax(xp.astype(least, xp.int8), axis=-1)
        chosen.append(candidates[item, run, best])
        nearest = xp.minimum(nearest, _rows(between, chosen[-1]))
    indices: Array = xp.stack(chosen, axis=-1)
    return indices


def _squares(G: Array) -> Array:
    """Squared distances between points of these inner products. [b, p, p]"""
    xp = namespace(G)
    lengths = xp.linalg.diagonal(G)
    apart = lengths[..., :, None] + lengths[..., None, :] - 2 * G
    clipped: Array = xp.clip(apart, min=0.0)
    return clipped


def _rows(X: Array, index: Array) -> Array:
    """Rows of X [b, p, q] at index [b, ...]. [b, ..., q]"""
    xp = namespace(X)
    batch, count, width = X.shape
    start = xp.arange(0, batch * count, count, device=X.device)
    place = index + xp.reshape(start, (-1,) + (1,) * (index.ndim - 1))
    found = xp.take(xp.reshape(X, (-1, width)), xp.reshape(place, (-1,)), axis=0)
    rows: Array = xp.reshape(found, (*index.shape, width))
    return rows


def _drawn(weights: Array, draws: Array) -> Array:
    """Indices [b, n, t] with probability in proportion to weights [b, n, p], from draws [n, t]."""
    xp = namespace(weights)
    sums = xp.cumulative_sum(weights, axis=-1)
    # A draw lies below 1, so that the first sum above it belongs to a weight that is not zero.
    wanted = draws * sums[..., -1:]
    passed = xp.sum(xp.astype(sums[..., None, :] <= wanted[..., None], xp.int64), axis=-1)
    found: Array = xp.clip(passed, max=weights.shape[-1] - 1)
    return found
