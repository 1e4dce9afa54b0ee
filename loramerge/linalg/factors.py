"""Sums, norms, inner products and exact errors of delta weights, from their factors."""

from collections.abc import Sequence

from msgspec import Struct

from loramerge.adapter import Array, LowRank, Updates
from loramerge.linalg.kernels import double, gram, kernels, like, namespace, put
from loramerge.linalg.masks import uniform

__all__ = [
    "Closeness",
    "Grams",
    "by_owner",
    "compare",
    "concat",
    "doubled",
    "grams",
    "inner_products",
    "norm",
    "pad",
    "revived",
    "scale",
    "summed",
    "term_by_term",
]

# A squared norm that is smaller than this many roundings of the terms it was added up from is
# taken again in higher precision: the relative error of what is reported stays below 1e-2. Where
# the highest precision ends, it is zero.
ROUNDINGS = 100.0
SINGLE, DOUBLE = 2.0**-23, 2.0**-52


class Closeness(Struct, frozen=True):
    """How near a result is to a target: squared norms, inner product, squared distance. All [*b]"""

    target: Array
    result: Array
    inner: Array
    error: Array


class Grams(Struct, frozen=True):
    """B^T B and A A^T of an update, in float64. Both [*b, r, r]"""

    B: Array
    A: Array


def grams(update: LowRank) -> Grams:
    """The Gram matrices of an update, multiplied in its own precision."""
    return Grams(B=gram(update.B), A=gram(update.A.mT))


def doubled(update: LowRank) -> LowRank:
    """The same factors in float64."""
    return LowRank(A=double(update.A), B=double(update.B))


def scale(update: LowRank, factor: float | Array) -> LowRank:
    """Factor * dW, the factor on B: exact wherever the factor is a power of two.

    One number, or one for each item of the batch [*b].
    """
    if not isinstance(factor, float | int):
        return LowRank(update.A, update.B * like(factor, update.B)[..., None, None])
    return update if factor == 1 else LowRank(update.A, update.B * factor)


def concat(updates: Sequence[LowRank], weights: Sequence[float | Array]) -> LowRank:
    """sum_t w_t dW_t exactly: A stacked, w_t B side by side. Rank sum of ranks.

    Each weight is one number, or one for each item of the batch [*b].
    """
    terms = [scale(update, weight) for update, weight in zip(updates, weights, strict=True)]
    if len(terms) == 1:
        return terms[0]
    xp = namespace(terms[0].A)
    A = xp.concat([term.A for term in terms], axis=-2)
    return LowRank(A=A, B=xp.concat([term.B for term in terms], axis=-1))


def summed(updates: Updates) -> tuple[LowRank, Grams]:
    """The exact weighted sum as `concat` has it, and its Gram matrices: once for a batch."""
    key = "sum", updates.weights, *(id(factor) for factor in updates.factors)
    if key not in updates.shared:
        whole = concat(updates.factors, updates.weights)
        # The factors are kept, and with them their ids.
        updates.shared[key] = whole, grams(whole), updates.factors
    whole, known, _ = updates.shared[key]
    return whole, known


def pad(update: LowRank, rank: int) -> LowRank:
    """The same delta weight with zero terms up to `rank`."""
    missing = rank - update.rank
    if missing <= 0:
        return update
    A, B = update.A, update.B
    xp = namespace(A)
    rows = xp.zeros((*A.shape[:-2], missing, A.shape[-1]), dtype=A.dtype, device=A.device)
    columns = xp.zeros((*B.shape[:-1], missing), dtype=B.dtype, device=B.device)
    return LowRank(A=xp.concat([A, rows], axis=-2), B=xp.concat([B, columns], axis=-1))


def inner_products(updates: Sequence[LowRank]) -> Array:
    """<dW_s, dW_t> of every two updates: sum((B_s^T B_t) * (A_s A_t^T)). float64 [*b, k, k]

    In float64 from the start: terms of one update may cancel to far below their own size.
    """
    A = namespace(updates[0].A).concat([double(u.A) for u in updates], axis=-2)
    B = namespace(A).concat([double(u.B) for u in updates], axis=-1)
    return by_owner(gram(B) * gram(A.mT), [u.rank for u in updates])


def by_owner(terms: Array, ranks: Sequence[int]) -> Array:
    """Sums over the blocks [r_s, r_t] of terms [*b, s, s] of updates of these ranks. [*b, k, k]"""
    xp = namespace(terms)
    owner = [
        [float(s == t) for s in range(len(ranks))] for t, r in enumerate(ranks) for _ in range(r)
    ]
    E = xp.asarray(owner, dtype=terms.dtype, device=terms.device)
    found: Array = E.mT @ terms @ E
    return found


def revived(update: LowRank, key: int) -> LowRank:
    """The same delta weight, its zero terms as PEFT starts them: A in +-1 / sqrt(n), B zero.

    A term that is zero on both sides has no gradient, and would never be trained. No batch: A
    [r, n], B [m, r]; the key decides the random numbers.
    """
    xp = namespace(update.A)
    dead = ~(xp.any(update.A != 0, axis=-1) | xp.any(update.B != 0, axis=-2))
    bound = update.A.shape[-1] ** -0.5
    fresh = bound * (2 * uniform([key], (0, 0), update.A.shape, update.A) - 1)
    return LowRank(xp.where(dead[:, None], fresh, update.A), update.B)


def norm(update: LowRank, known: Grams | None = None) -> Array:
    """||B @ A||_F, in float64, from its Gram matrices where they are known. [*b]

    As `compare` does it: an update whose own terms cancel, such as [B, -B0] with B near B0, has a
    norm far below the rounding of a float32 Gram matrix.
    """
    root: Array = compare(update, _nothing(update), known).target ** 0.5
    return root


def compare(target: LowRank, result: LowRank, known: Grams | None = None) -> Closeness:
    """||target||^2, ||result||^2, <target, result> and ||target - result||^2 of delta weights.

    In the factors' own precision first; where the numbers asked for are near the rounding of that,
    with float64 Gram matrices; where still so, by QR of [B_target, -B_result] and
    [A_target; A_result], which loses nothing to squaring. `known` are the target's Gram matrices,
    where they have been computed already.
    """
    result = LowRank(like(result.A, target.A), like(result.B, target.B))
    xp = namespace(target.A)
    same = _same(target, result)
    if same is not None and bool(xp.all(same)):
        length = compare(target, _nothing(target), known).target
        return Closeness(length, length, length, 0 * length)
    found, clear = _by_gram(target, result, SINGLE, known)
    if not bool(xp.all(clear)):
        found = _put(found, ~clear, _wide(_at(target, ~clear), _at(result, ~clear)))
    if same is not None and bool(xp.any(same)):
        own = _at(target, same)
        found = _put(found, same, compare(own, own, known and Grams(known.B[same], known.A[same])))
    return found


def _wide(target: LowRank, result: LowRank) -> Closeness:
    """The four numbers in float64, from Gram matrices where those are enough."""
    target = LowRank(double(target.A), double(target.B))
    result = LowRank(double(result.A), double(result.B))
    found, clear = _by_gram(target, result, DOUBLE, None)
    if bool(namespace(clear).all(clear)):
        return found
    return _put(found, ~clear, _by_qr(_at(target, ~clear), _at(result, ~clear)))


def term_by_term(target: LowRank, result: LowRank) -> tuple[Array, Array]:
    """<target, term> and ||term||^2 of each rank-1 term of a result, in float64. Both [*b, r]"""
    xp = namespace(target.A)
    A, B = double(result.A), double(result.B)
    crossed = (double(target.B).mT @ B) * (double(target.A) @ A.mT)
    return xp.sum(crossed, axis=-2), xp.sum(B**2, axis=-2) * xp.sum(A**2, axis=-1)


def _same(target: LowRank, result: LowRank) -> Array | None:
    """Where two updates have the same factors, to the bit; there is nothing to measure there. [*b]

    None where their ranks differ.
    """
    if target.rank != result.rank or target.rank == 0:
        return None
    xp = namespace(target.A)
    same: Array = xp.all(target.A == result.A, axis=(-2, -1))
    same &= xp.all(target.B == result.B, axis=(-2, -1))
    return same


def _nothing(update: LowRank) -> LowRank:
    return LowRank(update.A[..., :0, :], update.B[..., :0])


def _at(update: LowRank, where: Array) -> LowRank:
    """Some items of a batch."""
    return LowRank(update.A[where], update.B[where])


def _put(found: Closeness, where: Array, better: Closeness) -> Closeness:
    """Other numbers for some items of a batch."""
    return Closeness(
        target=put(found.target, where, better.target),
        result=put(found.result, where, better.result),
        inner=put(found.inner, where, better.inner),
        error=put(found.error, where, better.error),
    )


def _by_gram(
    target: LowRank, result: LowRank, epsilon: float, known: Grams | None
) -> tuple[Closeness, Array]:
    """The four numbers from Gram matrices, and where no rounding can be seen in them. [*b]"""
    known, own = known or grams(target), grams(result)
    product = kernels(target.A).inner
    crossed = double(product(target.B, result.B)) * double(product(target.A.mT, result.A.mT))
    terms = (known.B * known.A, crossed, own.B * own.A)
    length, inner, result_length = (_sum(term) for term in terms)
    error = length - 2 * inner + result_length
    sizes = [_sum(abs(term)) for term in terms]
    whole = sizes[0] + 2 * sizes[1] + sizes[2]
    seen = ROUNDINGS * epsilon
    clear = (error > seen * whole) & (length > seen * sizes[0])
    return Closeness(length, result_length, inner, error), clear | (whole == 0)


def _by_qr(target_update: LowRank, result_update: LowRank) -> Closeness:
    """The four numbers from R_B R_A^T, a small matrix of the same norm."""
    both, split = concat([target_update, result_update], [1.0, -1.0]), target_update.rank
    xp = namespace(both.B)
    R_B, R_A = xp.linalg.qr(both.B)[1], xp.linalg.qr(both.A.mT)[1]
    target = R_B[..., :, :split] @ R_A[..., :, :split].mT
    result = -(R_B[..., :, split:] @ R_A[..., :, split:].mT)
    longest = xp.sum(R_B**2, axis=-2) ** 0.5 * xp.sum(R_A**2, axis=-2) ** 0.5
    seen = (ROUNDINGS * DOUBLE * xp.sum(longest, axis=-1)) ** 2
    squares = [_sum(x**2) for x in (target, result, target - result)]
    length, result_length, error = (xp.where(x > seen, x, xp.zeros_like(x)) for x in squares)
    inner = xp.where((length > 0) & (result_length > 0), _sum(target * result), 0.0 * seen)
    return Closeness(length, result_length, inner, error)


def _sum(terms: Array) -> Array:
    """The sum of each matrix. [*b]"""
    total: Array = namespace(terms).sum(terms, axis=(-2, -1))
    return total
