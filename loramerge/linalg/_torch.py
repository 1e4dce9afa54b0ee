"""The kernels on torch tensors, whole batches at a time: CUDA, MPS, and the CPU for tests."""

import math
from typing import TYPE_CHECKING, TypeAlias, cast

from loramerge._lazy import np, torch
from loramerge.adapter import Array
from loramerge.linalg.seeding import starts

if TYPE_CHECKING:
    Tensor: TypeAlias = torch.Tensor
else:
    Tensor: TypeAlias = object

# Points nearer than this share of the longest one count as the same point, as on the CPU.
SAME = 6
# scikit-learn's bound on Lloyd's iterations.
ITERATIONS = 300


def bits(x: Tensor) -> Tensor:
    """The bits of float32 numbers, as they lie in memory."""
    return x.view(torch.int32)


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

    All batch items and restarts run side by side. Like scikit-learn otherwise: empty clusters move
    to the farthest points, and the best of the restarts is kept.
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
    items = torch.arange(len(X), device=X.device)[:, None, None]
    chosen = starts(cast(Array, X), cast(Array, live), k, seed, restarts)
    centers = X[items, cast(Tensor, chosen)]
    X, live = X[:, None], live[:, None]
    labels = torch.full((len(X), restarts, X.shape[-2]), -1, device=X.device)
    for _ in range(ITERATIONS):
        distances = torch.cdist(X, centers)
        before, labels = labels, distances.argmin(-1)
        if torch.equal(before, labels):
            break
        members = torch.nn.functional.one_hot(labels, k).to(X.dtype) * live[..., None]
        sizes = members.sum(-2)
        centers = members.mT @ X / sizes.clamp(min=1)[..., None]
        own = distances.gather(-1, labels[..., None])[..., 0] * live
        centers = _relocated(centers, sizes == 0, X, own)
    members = torch.nn.functional.one_hot(labels, k).to(X.dtype) * live[..., None]
    centers = members.mT @ X / members.sum(-2).clamp(min=1)[..., None]
    inertia = (((X - members @ centers) ** 2).sum(-1) * live).sum(-1)
    best = inertia.argmin(-1, keepdim=True)
    found = labels.gather(1, best[..., None].expand(-1, -1, labels.shape[-1]))[:, 0]
    return found, inertia.gather(-1, best)[:, 0]


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


def tally(x: Tensor, bins: int) -> Tensor:
    """How often each whole number occurs."""
    return torch.bincount(x, minlength=bins)
