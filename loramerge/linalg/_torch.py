"""The kernels on torch tensors, whole batches at a time: CUDA, MPS, and the CPU for tests."""

import math
from typing import TYPE_CHECKING, TypeAlias

from loramerge._lazy import np, torch

if TYPE_CHECKING:
    Tensor: TypeAlias = torch.Tensor
else:
    Tensor: TypeAlias = object

# Points nearer than this share of the longest one count as the same point, as on the CPU.
SAME = 6
# scikit-learn's bound on Lloyd's iterations.
ITERATIONS = 300


def cholesky(G: Tensor) -> tuple[Tensor, Tensor]:
    """Lower L with G = L L^T, and ok [*b]; L is zero where G is not positive definite."""
    L, info = torch.linalg.cholesky_ex(G)
    ok = info == 0
    return torch.where(ok[..., None, None], L, torch.zeros_like(L)), ok


def gaussian(model: Tensor, rows: int, columns: int, seed: int) -> Tensor:
    """A standard normal matrix of a seed: NumPy's values, moved to the device."""
    values = np.random.default_rng(seed).standard_normal((rows, columns))
    return torch.from_numpy(values).to(device=model.device, dtype=model.dtype)


def kmeans(points: Tensor, k: int, seed: int, restarts: int) -> tuple[Tensor, Tensor]:
    """Labels [*b, p] and inertia [*b]: Lloyd's algorithm from greedy k-means++ starts.

    All batch items and restarts run side by side and draw the same random numbers, so that an
    item's result depends neither on its batch nor on the device. Like scikit-learn's otherwise:
    2 + log k candidates per centre, empty clusters move to the farthest points, best of restarts.
    """
    *batch, count, _ = points.shape
    X = points.reshape(-1, count, points.shape[-1])
    live = (X != 0).any(-1)
    labels, distinct = _distinct(X, live)
    inertia = X.new_zeros(len(X))
    hard = torch.nonzero(distinct > k)[:, 0]
    if len(hard):
        labels[hard], inertia[hard] = _lloyd(X[hard], live[hard], k, seed, restarts)
    return labels.reshape(*batch, count), inertia.reshape(batch)


def _distinct(X: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Each live point numbered by its first equal, [b, p], and how many numbers there are, [b]."""
    longest = X.abs().amax((-2, -1), keepdim=True)
    rounded = torch.round(X / torch.where(longest > 0, longest, 1.0), decimals=SAME)
    same = (torch.cdist(rounded, rounded, p=math.inf) == 0) & live[:, None, :]
    first = same.to(torch.uint8).argmax(-1)
    new = live & (first == torch.arange(X.shape[-2], device=X.device))
    number = new.cumsum(-1) - 1
    return number.gather(-1, first) * live, new.sum(-1)


def _lloyd(X: Tensor, live: Tensor, k: int, seed: int, restarts: int) -> tuple[Tensor, Tensor]:
    """k-means on X [b, p, d] with more than k distinct live points: labels [b, p], inertia [b]."""
    X, live = X[:, None], live[:, None]
    centers = X.expand(-1, restarts, -1, -1).gather(
        -2, _starts(X, live, k, seed, restarts)[..., None].expand(-1, -1, -1, X.shape[-1])
    )
    labels = torch.full((len(X), restarts, X.shape[-2]), -1, device=X.device)
    for _ in range(ITERATIONS):
        squares = _squares(X, centers)
        before, labels = labels, squares.argmin(-1)
        if torch.equal(before, labels):
            break
        members = torch.nn.functional.one_hot(labels, k).to(X.dtype) * live[..., None]
        sizes = members.sum(-2)
        centers = members.mT @ X / sizes.clamp(min=1)[..., None]
        own = squares.gather(-1, labels[..., None])[..., 0] * live
        centers = _relocated(centers, sizes == 0, X, own)
    members = torch.nn.functional.one_hot(labels, k).to(X.dtype) * live[..., None]
    centers = members.mT @ X / members.sum(-2).clamp(min=1)[..., None]
    inertia = (((X - members @ centers) ** 2).sum(-1) * live).sum(-1)
    best = inertia.argmin(-1, keepdim=True)
    chosen = labels.gather(1, best[..., None].expand(-1, -1, labels.shape[-1]))[:, 0]
    return chosen, inertia.gather(-1, best)[:, 0]


def _squares(X: Tensor, Y: Tensor) -> Tensor:
    """Squared distances between points X [.., p, d] and Y [.., q, d]: [.., p, q]."""
    inner = X @ Y.mT
    lengths = (X**2).sum(-1)[..., :, None] + (Y**2).sum(-1)[..., None, :]
    return (lengths - 2 * inner).clamp(min=0)


def _starts(X: Tensor, live: Tensor, k: int, seed: int, restarts: int) -> Tensor:
    """Indices [b, n, k] of greedy k-means++ (Arthur and Vassilvitskii 2007, section 6).

    Of several candidates, drawn with probability in proportion to the squared distance from the
    nearest centre so far, each step takes the one that lowers the total most. X [b, 1, p, d].
    """
    trials = 2 + int(math.log(k))
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(restarts, k, trials, generator=generator, dtype=torch.float64).to(X)
    between = _squares(X, X)[:, 0] * live
    nearest = live.to(X.dtype).expand(-1, restarts, -1)
    chosen = [_drawn(nearest, draws[:, 0, :1])]
    items = torch.arange(len(X), device=X.device)[:, None, None]
    nearest = between[items, chosen[0]][:, :, 0]
    for step in range(1, k):
        candidates = _drawn(nearest, draws[:, step])
        nearer = torch.minimum(nearest[:, :, None], between[items, candidates])
        best = nearer.sum(-1).argmin(-1, keepdim=True)
        chosen.append(candidates.gather(-1, best))
        nearest = nearer.gather(2, best[..., None].expand(-1, -1, -1, nearer.shape[-1]))[:, :, 0]
    return torch.cat(chosen, -1)


def _drawn(weights: Tensor, draws: Tensor) -> Tensor:
    """Indices [b, n, t] with probability in proportion to weights [b, n, p], from draws [n, t]."""
    sums = weights.cumsum(-1)
    # A draw lies below 1, so that `right` finds an index whose own weight is not zero.
    wanted = (draws * sums[..., -1:]).contiguous()
    return torch.searchsorted(sums, wanted, right=True).clamp(max=weights.shape[-1] - 1)


def _relocated(centers: Tensor, empty: Tensor, X: Tensor, own: Tensor) -> Tensor:
    """Centres with empty clusters moved to the points farthest from their own centre."""
    if not bool(empty.any()):
        return centers
    farthest = own.argsort(stable=True, dim=-1, descending=True)
    turn = (empty.cumsum(-1) - 1).clamp(min=0)
    index = farthest.gather(-1, turn)[..., None].expand(-1, -1, -1, X.shape[-1])
    return torch.where(
        empty[..., None], X.expand(-1, len(own[0]), -1, -1).gather(-2, index), centers
    )
