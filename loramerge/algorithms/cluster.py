"""LoRA-LEGO: rank-wise clustering of minimal semantic units."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from loramerge.adapter import Array, LowRank, Updates
from loramerge.algorithms._gauges import Gauge, gauged
from loramerge.linalg.kernels import double, gram, like, namespace
from loramerge.linalg.kmeans import kmeans
from loramerge.linalg.spectrum import columnwise
from loramerge.options import Count, Options
from loramerge.registry import Score, Sweep, merger

# MSUs with less than this share of the largest energy are zero ranks; they join no cluster.
ZERO = 1e-24
# Below this cosine two MSUs are at right angles, as those of one adapter are in the svd gauge, and
# the sign of their inner product is rounding noise. Unrelated ones have about 1e-2.
ORTHOGONAL = 1e-3
# Below this share of their own squared lengths, a float32 Gram matrix has less than two digits of
# the squared distance of two MSUs.
NEAR = 1e-5


class ClusterOptions(Options, frozen=True):
    """How many clusters, of what, and how long their representatives are."""

    k: Annotated[
        Count | None,
        Meta(
            description="Clusters of the pooled rank-1 components, which is the output rank. "
            "Default: the largest input rank.",
        ),
    ] = None
    gauge: Annotated[
        Gauge,
        Meta(
            description="svd: independent of how a file factors its update. "
            "balanced: rank-1 terms as trained, with |a| = |b|. raw: as stored (the paper's)."
        ),
    ] = "svd"
    reweight: Annotated[
        Literal["linf", "l2", "none"],
        Meta(
            description="Parameter reweighting: centroids get the mean norm of their members; "
            "linf is what published implementations do."
        ),
    ] = "linf"
    restarts: Annotated[
        Count,
        Meta(description="Runs of k-means from new starts; the one of least inertia is kept."),
    ] = 10


def output_reweighting(updates: Updates, options: ClusterOptions) -> float:
    """sqrt(r / k), the paper's factor on the merged update; r is the mean rank of the inputs."""
    pooled = sum(factor.rank for factor in updates.factors)
    return float((updates.mean_rank / min(options.k or pooled, pooled)) ** 0.5)


def each_k(
    updates: Updates, options: ClusterOptions, values: Sequence[int]
) -> Iterator[tuple[LowRank, Mapping[str, Array]]]:
    """What `cluster` makes of each k, with its inertia; the MSUs are the same for all."""
    units = _units(updates, options)
    for k in values:
        result, inertia = _clustered(units, msgspec.structs.replace(options, k=k), updates.seed)
        yield result, {"inertia": inertia}


@merger(
    "cluster",
    paper="arXiv:2409.16167",
    options=ClusterOptions,
    example="loramerge cluster a.safetensors b.safetensors -k 16",
    scale="auto",
    rank_option="k",
    paper_scale=output_reweighting,
    sweep=Sweep("k", each_k, "loramerge cluster a.safetensors b.safetensors --sweep-k 4,8,16,32"),
    cost="iterative",
    score=Score(0.494, "cluster -k 16 --gauge svd --scale auto"),
)
def cluster(updates: Updates, options: ClusterOptions) -> LowRank:
    """Cluster the rank-1 components of all adapters and keep each cluster's mean (LoRA-LEGO).

    A minimal semantic unit (MSU) of adapter t is x = sqrt(|w_t|) (a_i, sign(w_t) b_i), row i of A
    and column i of B. All MSUs of a module are clustered by k-means (k clusters, 10 restarts,
    seeded); a cluster becomes its mean, brought back to the mean norm of its members (parameter
    reweighting). k is the output rank; k = sum of ranks is the weighted sum exactly. Where a module
    has fewer distinct MSUs than k, all are kept.

    Where it differs. (a, b) and (-a, -b) are the same update, so MSUs are aligned in sign before
    clustering and against their centroid after it; no published implementation does. Before that
    each adapter is brought to the svd gauge, since rank i of a trained LoRA is not canonical
    (--gauge raw for the paper's; repeated singular values leave a freedom in this gauge too).
    k-means is our own, on the inner products alone: it gives scikit-learn's labels, in a fraction
    of the time, and of starts that are equally good it takes the first.
    The paper's output reweighting sqrt(r / k) is `--scale paper`; the default scale is `auto`.
    PEFT and mergekit have no such method. KnOTS brings adapters to common directions instead of
    grouping those they have: `ties --space knots`.
    """
    return _clustered(_units(updates, options), options, updates.seed)[0]


class _Units(Struct, frozen=True):
    """All MSUs of a module, with their inner products, and signs that make them agree."""

    pooled: LowRank
    G: Array
    sign: Array


def _units(updates: Updates, options: ClusterOptions) -> _Units:
    pooled = gauged(updates, options.gauge)
    G = gram(pooled.A.mT) + gram(pooled.B)
    if _near_copies(G):
        G = gram(double(pooled.A.mT)) + gram(double(pooled.B))
    return _Units(pooled, G, _aligned(G))


def _near_copies(G: Array) -> bool:
    """Whether any two MSUs are so near, up to sign, that float32 could not tell how near."""
    xp = namespace(G)
    lengths = xp.linalg.diagonal(G)
    both = lengths[..., :, None] + lengths[..., None, :]
    index = xp.arange(G.shape[-1], device=G.device)
    near = (both - 2 * xp.abs(G) < NEAR * both) & (index[:, None] != index)
    return bool(xp.any(near))


def _clustered(units: _Units, options: ClusterOptions, seed: int) -> tuple[LowRank, Array]:
    """The representatives of k clusters, and the inertia of the clustering. [*b]"""
    pooled, G, sign = units.pooled, units.G, units.sign
    xp = namespace(G)
    members, inertia = _members(G * sign[..., :, None] * sign[..., None, :], options, seed)
    # Members that point away from their centroid are turned round, and the mean is taken again.
    inner = xp.sum((G @ (members * sign[..., :, None])) * members, axis=-1)
    sign = xp.where(inner * sign < 0, -sign, sign)
    sizes = xp.clip(xp.sum(members, axis=-2), min=1.0)
    shares = members / sizes[..., None, :]
    mix = like(shares * sign[..., :, None], pooled.B)
    centroids = LowRank(A=mix.mT @ pooled.A, B=pooled.B @ mix)
    return _reweighted(centroids, pooled, shares, options.reweight), inertia


def _members(G: Array, options: ClusterOptions, seed: int) -> tuple[Array, Array]:
    """Membership [*b, M, k] and inertia from k-means on MSUs whose inner products are G."""
    xp = namespace(G)
    count = G.shape[-1]
    k = min(options.k or count, count)
    energy = xp.linalg.diagonal(G)
    live = like(energy > ZERO * xp.sum(energy, axis=-1)[..., None], G)
    if k == count:
        labels = xp.broadcast_to(xp.arange(count, device=G.device), energy.shape)
        inertia = 0 * energy[..., 0]
    else:
        alive = G * live[..., :, None] * live[..., None, :]
        labels, inertia = kmeans(alive, k, seed, options.restarts)
    clusters = xp.arange(k, device=G.device)
    return like(labels[..., None] == clusters, G) * live[..., :, None], inertia


def _aligned(G: Array) -> Array:
    """Signs [*b, M] in order of decreasing energy: each MSU agrees with the nearest before it.

    One at right angles to all before it keeps the sign its gauge gave it.
    """
    xp = namespace(G)
    length = xp.clip(xp.linalg.diagonal(G), min=1e-300) ** 0.5
    order = xp.argsort(-length, axis=-1, stable=True)
    cosines = G / (length[..., :, None] * length[..., None, :])
    cosines = xp.take_along_axis(cosines, order[..., :, None], axis=-2)
    cosines = xp.take_along_axis(cosines, order[..., None, :], axis=-1)
    # The nearest before does not depend on signs: a chain of agreements is walked in jumps.
    index = xp.arange(length.shape[-1], device=G.device)
    before = xp.where(index[:, None] > index, xp.abs(cosines), -xp.ones_like(cosines))
    nearest = xp.argmax(before, axis=-1)
    cosine = xp.take_along_axis(cosines, nearest[..., None], axis=-1)[..., 0]
    nearest = xp.where(xp.abs(cosine) > ORTHOGONAL, nearest, index)
    signs = 1 - 2 * like(cosine < -ORTHOGONAL, length)
    for _ in range(length.shape[-1].bit_length()):
        signs = signs * xp.take_along_axis(signs, nearest, axis=-1)
        nearest = xp.take_along_axis(nearest, nearest, axis=-1)
    back: Array = xp.take_along_axis(signs, xp.argsort(order, axis=-1), axis=-1)
    return back


def _reweighted(centroids: LowRank, pooled: LowRank, shares: Array, how: str) -> LowRank:
    """Each centroid times (mean norm of its members) / (its own norm), on both factors."""
    if how == "none":
        return centroids
    xp = namespace(shares)
    wanted = xp.sum(double(_length(pooled, how))[..., :, None] * shares, axis=-2)
    found = double(_length(centroids, how))
    factor = like(
        xp.where(found > 0, wanted / xp.where(found > 0, found, wanted + 1), found), pooled.B
    )
    return LowRank(A=centroids.A * factor[..., :, None], B=centroids.B * factor[..., None, :])


def _length(units: LowRank, how: str) -> Array:
    """The norm of each concatenated (a, b): largest entry, or Euclidean. [*b, r]"""
    xp = namespace(units.B)
    if how == "l2":
        squares: Array = xp.sum(units.A**2, axis=-1) + xp.sum(units.B**2, axis=-2)
        return squares**0.5
    a = xp.maximum(xp.max(units.A, axis=-1), -xp.min(units.A, axis=-1))
    b = xp.maximum(columnwise(xp.max, units.B), -columnwise(xp.min, units.B))
    longest: Array = xp.maximum(a, b)
    return longest
