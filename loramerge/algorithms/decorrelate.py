"""Decorrelate: a merge that answers every task's inputs as that task's own update does."""

from typing import Annotated, Literal, NamedTuple

from msgspec import Meta
from msgspec.structs import replace

from loramerge.adapter import Array, LowRank, Updates
from loramerge.algorithms._inputs import Inputs, answers, diagonal, inputs, inverse, root
from loramerge.algorithms._orthogonal import orthogonal
from loramerge.linalg.factors import Grams, by_owner, concat
from loramerge.linalg.kernels import double, gram, kernels, like, namespace
from loramerge.linalg.spectrum import Spectrum, basis, decompose
from loramerge.options import Options
from loramerge.registry import Score, merger

# What is left of parts that cancel is rounding below this share of their squared norms.
CANCELLED = 1e-10
# Singular values are lifted like one of this share of the largest where they are smaller: what is
# near zero is rounding and stays there.
SMALLEST = 1e-2


class DecorrelateOptions(Options, frozen=True):
    """How firmly inputs are told apart, and how evenly directions of the result count."""

    ridge: Annotated[
        float,
        Meta(gt=0, description="Ridge of the regression, relative to the mean input energy."),
    ] = 0.2
    sides: Annotated[
        Literal["auto", "input", "both", "none"],
        Meta(
            description="By what a result is made anew: what updates read (input), that and what "
            "they write (both), or nothing: the sum of tsv, set right on what they read (none). "
            "auto goes by names: both for queries, keys and outputs of attention, input for "
            "values and the way out of an MLP, none elsewhere."
        ),
    ] = "auto"
    flatten: Annotated[
        float,
        Meta(
            gt=0,
            le=1,
            description="Power of the leading singular values where many updates are merged; "
            "1 leaves them.",
        ),
    ] = 0.5


class Agreement(NamedTuple):
    """How long updates are, and how far they differ: 0 for copies, 1 at right angles.

    norms [*b, k], of the weighted updates; the others [*b]. `effective` is how many there are in
    effect, from 1 to k; `length` is what the result gets.
    """

    norms: Array
    total: Array
    effective: Array
    difference: Array
    length: Array


@merger(
    "decorrelate",
    paper="ours",
    options=DecorrelateOptions,
    example="loramerge decorrelate a b --rank 16",
    scale="paper",
    place="thin",
    cost="one-shot",
    score=Score(0.684, "decorrelate --rank 16 --scale paper"),
    siblings=True,
)
def decorrelate(updates: Updates, options: DecorrelateOptions) -> Spectrum:
    """Answer every task's inputs as its own update does, inputs read off the adapters alone.

    What a merged W should do: minimise sum_t tr((W - w_t dW_t) G_t (W - w_t dW_t)^T), G_t the
    covariance of task t's inputs, and stay near a W_0 where no input says anything. So
    W = (sum_t w_t dW_t G_t + l W_0) (H + l I)^-1,  H = sum_t G_t,  l = ridge tr(H) / n.
    No inputs are at hand, but training leaves their trace: dW_t is a sum of gradients times
    inputs, so dW_t^T dW_t is large where inputs are. G_t is the mean of dW^T dW / ||dW||^2 over
    those modules of adapter t that read the same input (q, k, v; gate, up; any other alone).

    A trained A is mostly what it started from. Where all tasks started from the same A, directions
    common to what all updates read tell none from another, and count a fifth in G_t: what is left
    is what each has learned.

    W_0 is the sum of `tsv` in gate and up projections and wherever names say nothing: in an MLP
    tasks read the same values and are told apart by few directions of their own, so what they share
    must stay as strong as it was, and only these directions are set right. Elsewhere W_0 = 0 and
    each update keeps its B and gets another A: what several updates listen to is shared out, what
    one alone listens to stays its own. Queries, keys and output projections of attention get half
    of that and half of the same of dW_t^T, another B to each A, both of unit length; values and
    down projections the first alone.

    Where W_0 = 0, the leading singular values (as many as an input has ranks on average) are raised
    to the power `flatten`, which keeps the directions of quiet tasks from drowning, and brought to
    the length min(||S||, (sum_t n_t)^2 / (T ||S||)), S the weighted sum and n_t = ||w_t dW_t||:
    that of the sum for updates at right angles, of one for copies. Copies need no decorrelation:
    with T_eff = (sum_t n_t)^2 / ||S||^2 in [1, T] and d = (1 - 1/T_eff) / (1 - 1/T), the regression
    has share d and S share 1 - d, each of unit length, and the power is
    1 - (1 - 1/T_eff) (1 - flatten). One adapter, or T copies, come back unchanged.

    Where it differs. RegMean (arXiv:2212.09849) has the inputs, and shrinks towards nothing. WUDI
    (arXiv:2503.08099) takes each module's own update and a pseudo-inverse, which collapses where
    adapters share their initial A. Everything is computed from factors: n x n matrices are never
    formed (Woodbury).

    The condition in the report is that of H + l I on the inputs there are, and of what `tsv`
    inverts. Copies raise it, and it does no harm there: nothing of them is told apart.

    What to expect. Made for many adapters of different tasks and an output of one adapter's rank:
    eight into rank 16 score .67 on average over four kinds of training (`tsv` .57). On 20 sets of
    eight tasks that nothing was chosen on it is ahead of `tsv` by .06 on average, on every kind of
    training, and behind by more than .02 on three sets of one group of tasks, by .05 at most (.09
    when these were trained again). Of four adapters it is ahead by .05, of two by .03. The best
    length depends on the base, which is not at hand: where a result can be measured, try --scale
    0.85 and 1.1 too. docs/decorrelate.md has the tables, and what did not work. What modules do and
    which read one input is told by their names.
    """
    sides = updates.sides if options.sides == "auto" else options.sides
    if sides == "none":
        return _corrected(updates, options.ridge)
    read = inputs(updates)
    B = concat(updates.factors, [1.0] * len(updates.factors)).B
    products = gram(double(B))
    weights = _weights(updates, products)
    # X [*b, s, k] stands for B @ X @ rows, and this one for the weighted sum.
    S = weights * _eye(read)
    summed = products * _between(S, read)
    agreement = _agreement(by_owner(summed, [factor.rank for factor in updates.factors]))
    solved, condition = inverse(read.gram(), read.rows.shape[-1], options.ridge)
    X = weights * answers(read, solved)
    X = X * _unit(products * _between(X, read))
    if sides == "both":
        mix, other = _by_outputs(updates, read.products, products, options.ridge)
        turned = mix @ S
        X = X + turned * _unit(products * _between(turned, read))
        condition = namespace(B).maximum(condition, other)
    X = X * _unit(products * _between(X, read)) * agreement.difference[..., None, None]
    X = X + S * _unit(summed) * (1 - agreement.difference)[..., None, None]
    found = decompose(
        LowRank(A=like(X @ read.rows, B), B=B), Grams(B=products, A=_between(X, read))
    )
    return replace(_lengthened(found, updates, agreement, options.flatten), condition=condition)


def _eye(read: Inputs) -> Array:
    """What stands for the updates' own A. [s, k]"""
    mix = read.mix
    found: Array = namespace(mix).eye(*mix.shape[-2:], dtype=mix.dtype, device=mix.device)
    return found[: read.own, :]


def _between(X: Array, read: Inputs) -> Array:
    """The inner products of the rows of X @ rows. [*b, s, s]"""
    found: Array = X @ read.products @ X.mT
    return found


def _weights(updates: Updates, model: Array) -> Array:
    """The weight of every rank-1 term of all updates. [s, 1]"""
    terms = zip(updates.factors, updates.weights, strict=True)
    column = [[weight] for factor, weight in terms for _ in range(factor.rank)]
    found: Array = namespace(model).asarray(column, dtype=model.dtype, device=model.device)
    return found


def _agreement(P: Array) -> Agreement:
    """How far updates agree whose inner products are P [*b, k, k]."""
    xp = namespace(P)
    norms = xp.clip(xp.linalg.diagonal(P), min=0.0) ** 0.5
    own, count = xp.sum(norms, axis=-1), _count(norms)
    total = xp.clip(xp.sum(P, axis=(-2, -1)), min=0.0) ** 0.5
    # What the norm of the sum would be at right angles, over what it is: sqrt(T) to 1 and below.
    square = own**2 / xp.where(total > 0, total, xp.ones_like(total)) ** 2
    effective = xp.where(total > 0, xp.clip(square, min=1.0), count)
    effective = xp.minimum(effective, count)
    several = xp.clip(count, min=2.0)
    difference = xp.where(count > 1, (1 - 1 / effective) / (1 - 1 / several), xp.zeros_like(count))
    length = xp.minimum(total, own / count * effective**0.5)
    return Agreement(norms, total, effective, difference, length)


def _count(norms: Array) -> Array:
    """How many updates are not zero, at least 1. [*b]"""
    xp = namespace(norms)
    count: Array = xp.clip(xp.sum(like(norms > 0, norms), axis=-1), min=1.0)
    return count


def _corrected(updates: Updates, ridge: float) -> Spectrum:
    """W_0 + sum_t (w_t dW_t - W_0) G_t (H + l I)^-1, W_0 = Q M P^T the sum of `tsv`.

    That is sum_t w_t dW_t G_t (H + l I)^-1 + W_0 (I - F^T (F F^T + l I)^-1 F). All of it is in the
    span of Q.
    """
    space, start, condition = orthogonal(updates)
    read = inputs(updates)
    solved, other = inverse(read.gram(), read.rows.shape[-1], ridge)
    into, columns = start @ space.right.mix.mT, space.right.columns
    seen = into @ (read.rows @ double(columns)).mT @ read.mix.mT @ solved @ read.mix
    change = space.left.coefficients @ answers(read, solved) - seen
    rows = like(into, columns) @ columns.mT + like(change @ read.rows, columns)
    right = basis(rows.mT)
    U, s, Vh = kernels(rows).svd(right.coefficients.mT)
    return Spectrum(
        left=space.left.columns,
        u=space.left.mix @ U,
        s=s,
        vh=Vh @ right.mix.mT,
        right=right.columns.mT,
        condition=namespace(rows).maximum(condition, other),
    )


def _by_outputs(updates: Updates, into: Array, out: Array, ridge: float) -> tuple[Array, Array]:
    """M [*b, s, s] with B M A = sum_t (K + l I)^-1 dW_t dW_t^T dW_t, and the condition. [*b]

    K = sum_t dW_t dW_t^T, each of trace 1; `into` are A A^T, and `out` B^T B. As the inputs of
    dW_t^T, but that what is solved for lies in the span of B, so that nothing of its length is
    needed.
    """
    turns, start, sides = [], 0, []
    for factor in updates.factors:
        own = slice(start, start := start + factor.rank)
        turns.append(root(into[..., own, own], out[..., own, own]))
        sides.append(out[..., own, own] @ turns[-1])
    R = diagonal(turns)
    solved, condition = inverse(R.mT @ out @ R, updates.factors[0].B.shape[-2], ridge)
    return R @ solved @ diagonal(sides).mT, condition


def _unit(terms: Array) -> Array:
    """What makes a sum of terms of length 1, by their inner products; 0 for nothing. [*b, 1, 1]"""
    xp = namespace(terms)
    square, size = xp.sum(terms, axis=(-2, -1)), xp.sum(xp.linalg.diagonal(terms), axis=-1)
    clear = square > CANCELLED * size
    short = xp.where(clear, square, xp.ones_like(square)) ** -0.5
    found: Array = xp.where(clear, short, xp.zeros_like(short))[..., None, None]
    return found


def _lengthened(
    found: Spectrum, updates: Updates, agreement: Agreement, flatten: float
) -> Spectrum:
    """Raise the leading singular values to a power, and bring these to length.

    Leading are as many as an input has ranks on average: the rest keeps its ratio to the last of
    them, so that a cut to a lower rank takes the same terms as before.
    """
    xp, s = namespace(found.s), found.s
    here = like(agreement.norms > 0, agreement.norms)
    stored = [float(f.rank) for f in updates.factors]
    ranks = xp.asarray(stored, dtype=s.dtype, device=s.device)
    mean = xp.sum(here * ranks, axis=-1) / _count(agreement.norms)
    leading = like(xp.arange(s.shape[-1], dtype=s.dtype, device=s.device) < mean[..., None], s)
    top = xp.where(s[..., :1] > 0, s[..., :1], xp.ones_like(s[..., :1]))
    ratio = xp.clip(s / top, min=SMALLEST)
    last = xp.min(xp.where(leading > 0, ratio, xp.ones_like(ratio)), axis=-1)[..., None]
    power = (flatten - 1) * (1 - 1 / agreement.effective)
    s = s * xp.where(leading > 0, ratio, last) ** power[..., None]
    length = xp.sum((s * leading) ** 2, axis=-1) ** 0.5
    unit = agreement.length / xp.where(length > 0, length, xp.ones_like(length))
    return Spectrum(found.left, found.u, s * unit[..., None], found.vh, found.right)
