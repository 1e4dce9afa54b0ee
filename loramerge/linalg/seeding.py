"""Where k-means begins: k-means++ for all restarts at once, the same in both backends."""

import math

from loramerge._lazy import np
from loramerge.adapter import Array
from loramerge.linalg.kernels import like, namespace

__all__ = ["starts"]

# Totals nearer than this share of each other are equal: which is smaller, rounding would decide.
# Such ties are common. Of two points that are each other's nearest, either one covers both.
TIE = 1e-9


def starts(X: Array, live: Array, k: int, seed: int, restarts: int) -> Array:
    """Indices [b, n, k] of greedy k-means++ (Arthur and Vassilvitskii 2007, section 6).

    Of 2 + log k candidates, drawn with probability in proportion to the squared distance from the
    nearest centre so far, each step takes the one that lowers the total most; the first of equals.
    But for such ties these are the starts scikit-learn finds with this random_state, which walks
    through the restarts one by one and spends four fifths of its time on them. X [b, p, d] with
    more than k distinct points among the `live` [b, p]. Every item of a batch draws the same random
    numbers, on any device, so that its result depends on nothing beside it.
    """
    xp = namespace(X)
    trials = 2 + int(math.log(k))
    numbers = np.random.RandomState(seed).random_sample((restarts, 1 + (k - 1) * trials))
    draws = xp.asarray(numbers, dtype=X.dtype, device=X.device)
    between = _squares(X) * like(live, X)[:, None, :]
    item = xp.arange(X.shape[0], device=X.device)[:, None]
    run = xp.arange(restarts, device=X.device)
    nearest = xp.broadcast_to(like(live, X)[:, None, :], (X.shape[0], restarts, X.shape[1]))
    chosen = [_drawn(nearest, draws[:, :1])[..., 0]]
    nearest = between[item, chosen[0]]
    for step in range(1, k):
        candidates = _drawn(nearest, draws[:, 1 + (step - 1) * trials :][:, :trials])
        nearer = xp.minimum(nearest[:, :, None, :], between[item[..., None], candidates])
        total = xp.sum(nearer, axis=-1)
        least = total <= (1 + TIE) * xp.min(total, axis=-1, keepdims=True)
        best = xp.argmax(xp.astype(least, xp.int8), axis=-1)
        chosen.append(candidates[item, run, best])
        nearest = nearer[item, run, best]
    indices: Array = xp.stack(chosen, axis=-1)
    return indices


def _squares(X: Array) -> Array:
    """Squared distances between points [b, p, d]. [b, p, p]"""
    xp = namespace(X)
    lengths = xp.sum(X**2, axis=-1)
    apart = lengths[..., :, None] + lengths[..., None, :] - 2 * (X @ X.mT)
    clipped: Array = xp.clip(apart, min=0.0)
    return clipped


def _drawn(weights: Array, draws: Array) -> Array:
    """Indices [b, n, t] with probability in proportion to weights [b, n, p], from draws [n, t]."""
    xp = namespace(weights)
    sums = xp.cumulative_sum(weights, axis=-1)
    # A draw lies below 1, so that the first sum above it belongs to a weight that is not zero.
    wanted = draws * sums[..., -1:]
    passed = xp.sum(xp.astype(sums[..., None, :] <= wanted[..., None], xp.int64), axis=-1)
    found: Array = xp.clip(passed, max=weights.shape[-1] - 1)
    return found
