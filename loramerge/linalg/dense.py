"""The leading singular vectors of a matrix that is held whole, in float32."""

from loramerge.adapter import Array
from loramerge.linalg.kernels import double, gram, kernels, like, namespace
from loramerge.linalg.spectrum import Spectrum

__all__ = ["SMALL", "compress"]

# Up to this many rows or columns the exact way takes less than a second.
SMALL = 1024
# Columns beyond the rank, and block power steps, of the Krylov space. On sign-elected sums of 2 to
# 8 updates, whose spectra are flat (s_k / s_k+1 = 1.01), the error is within 3e-4 of the least.
OVERSAMPLE, STEPS = 10, 3
# Singular values below this share of the largest are rounding noise of float32 entries.
NOISE = 1e-7


def compress(W: Array, rank: int | None, seed: int) -> Spectrum:
    """The thin SVD of W [*b, m, n], at least its first `rank` terms; None asks for all.

    Exact where m or n is at most 1024, or where as many terms are asked for; else from a block
    Krylov space of W times a Gaussian (Musco and Musco, arXiv:1504.05477, algorithm 2), which needs
    fewer passes over W than the power iterations of a randomized range finder.
    """
    least = min(W.shape[-2:])
    width = least if rank is None else (STEPS + 1) * (rank + OVERSAMPLE)
    if least <= SMALL or 2 * width > least:
        return _exact(W)
    assert rank is not None
    xp = namespace(W)
    Q = _orthonormal(W @ kernels(W).gaussian(W, W.shape[-1], rank + OVERSAMPLE, seed))
    last = Q
    for _ in range(STEPS):
        # Less what is known, or the largest singular value is all that is ever seen.
        new = W @ (W.mT @ last)
        last = _orthonormal(new - Q @ (Q.mT @ new))
        Q = _orthonormal(xp.concat([Q, last], axis=-1))
    right = Q.mT @ W
    # (Q^T W) = E diag(s) Vh with E from its Gram matrix: small, and float64.
    u, s, inverse = _by_gram(gram(double(right).mT))
    return Spectrum(Q, u, s, (u * inverse[..., None, :]).mT, right)


def _orthonormal(Y: Array) -> Array:
    """A basis of the columns of Y, found in float64, kept in the dtype of Y."""
    return like(namespace(Y).linalg.qr(double(Y))[0], Y)


def _exact(W: Array) -> Spectrum:
    """The whole SVD from the float64 Gram matrix of the shorter side."""
    xp = namespace(W)
    tall = W.shape[-2] > W.shape[-1]
    vectors, s, inverse = _by_gram(gram(double(W if tall else W.mT)))
    eye = like(xp.eye(s.shape[-1], dtype=s.dtype, device=s.device), W)
    mixed = vectors * inverse[..., None, :]
    if tall:
        return Spectrum(W, mixed, s, vectors.mT, eye)
    return Spectrum(eye, vectors, s, mixed.mT, W)


def _by_gram(G: Array) -> tuple[Array, Array, Array]:
    """Eigenvectors of a Gram matrix, its singular values in falling order, and their inverses."""
    xp = namespace(G)
    values, vectors = xp.linalg.eigh(G)
    vectors, values = xp.flip(vectors, axis=-1), xp.flip(values, axis=-1)
    s = xp.clip(values, min=0.0) ** 0.5
    zero = xp.zeros_like(s)
    live = s > NOISE * s[..., :1]
    s = xp.where(live, s, zero)
    return vectors, s, xp.where(live, 1 / xp.where(live, s, zero + 1), zero)
