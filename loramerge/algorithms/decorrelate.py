"""Decorrelate: a merge that answers every task's inputs as that task's own update does."""

from typing import Annotated, Literal, NamedTuple

from msgspec import Meta
from msgspec.structs import replace

from loramerge.adapter import Array, Role, Updates
from loramerge.algorithms._corrected import Mixed, between, corrected, decomposed, singular
from loramerge.algorithms._inputs import Inputs, answers, diagonal, inputs, inverse, root
from loramerge.linalg.factors import by_owner, summed
from loramerge.linalg.kernels import double, gram, like, namespace
from loramerge.linalg.spectrum import Spectrum, basis
from loramerge.options import Options
from loramerge.registry import Score, merger

# What is left of parts that cancel is rounding below this share of their squared norms.
CANCELLED = 1e-10
# Singular values are lifted like one of this share of the largest where they are smaller: what is
# near zero is rounding and stays there.
SMALLEST = 1e-2
# From so many updates in effect on, a result is what PARTS says; of fewer it is nearer to `tsv`.
MANY = 5


class Part(NamedTuple):
    """What a result is made of: `near` of it is the sum of `tsv`, `right` of the way set right.

    The rest is made anew by what updates read, and where `both` by what they write too.
    """

    near: float
    right: float
    both: bool = False


PARTS: dict[Role, Part] = {
    "query": Part(near=0.5, right=1, both=True),
    "value": Part(near=0, right=0),
    "output": Part(near=0, right=0, both=True),
    "down": Part(near=0.5, right=0),
    "other": Part(near=1, right=0.5),
}


class DecorrelateOptions(Options, frozen=True):
    """How firmly inputs are told apart, and how evenly directions of the result count."""

    ridge: Annotated[
        float,
        Meta(gt=0, description="Ridge of the regression, relative to the mean input energy."),
    ] = 0.2
    role: Annotated[
        Literal["auto", Role],
        Meta(
            description="What modules do, which decides what a result is made of: queries or keys "
            "(query), values (value) or the way out (output) of an attention, the way out of an "
            "MLP (down), or anything else. auto goes by names."
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
    effect, from 1 to k; `crowd` is on the way from 0 for one to 1 for MANY of these; `length` is
    what the result gets.
    """

    norms: Array
    total: Array
    effective: Array
    crowd: Array
    difference: Array
    length: Array


@merger(
    "decorrelate",
    paper="ours",
    options=DecorrelateOptions,
    example="loramerge decorrelate a b --rank 16",
    scale="size",
    place="thin",
    cost="one-shot",
    score=Score(0.697, "decorrelate --rank 16 --scale size"),
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

    W_0 = the sum of `tsv` keeps what tasks share as strong as it was, and only strong inputs of a
    task are set right. With W_0 = 0 each update keeps its B and gets another A: what several
    updates listen to is shared out, what one alone listens to stays its own. By what a module does:

    - queries and keys: the mean of both, the second by inputs and outputs
    - values: the second; outputs of an attention: the second, by inputs and outputs
    - the way out of an MLP: the mean of the plain sum of `tsv` and the second
    - gate and up, and where names say nothing: the first, half of the way from the sum of `tsv`

    By inputs and outputs: half of that and half of the same of dW_t^T, another B to each A, both of
    unit length. These are for five updates in effect and more. The fewer, the nearer to the sum of
    `tsv`: what is not it, and the way from it, have c = min((T_eff - 1) / 4, 1) of their share.

    Where W_0 = 0, the leading singular values (as many as an input has ranks on average) are raised
    to the power `flatten`, which keeps the directions of quiet tasks from drowning, and brought to
    the length min(||S||, (sum_t n_t)^2 / (T ||S||)), S the weighted sum and n_t = ||w_t dW_t||:
    that of the sum for updates at right angles, of one for copies. Copies need no decorrelation:
    with T_eff = (sum_t n_t)^2 / ||S||^2 in [1, T] and d = (1 - 1/T_eff) / (1 - 1/T), the regression
    has share d and S share 1 - d, each of unit length, and the power is
    1 - (1 - 1/T_eff) (1 - flatten). One adapter, or T copies, come back unchanged. The adapter as a
    whole is then shorter where updates are long (--scale size).

    Where it differs. RegMean (arXiv:2212.09849) has the inputs, and shrinks towards nothing. WUDI
    (arXiv:2503.08099) takes each module's own update and a pseudo-inverse, which collapses where
    adapters share their initial A. Everything is computed from factors: n x n matrices are never
    formed (Woodbury).

    The condition in the report is that of H + l I on the inputs there are, and of what `tsv`
    inverts. Copies raise it, and it does no harm there: nothing of them is told apart.

    What to expect. Made for many adapters of different tasks and an output of one adapter's rank:
    eight into rank 16 score .67 on average over four kinds of training (`tsv` .57). On 80 sets of
    eight tasks that nothing was chosen on it is ahead of `tsv` by .07 on average, from -.02 to
    +.21, and on every kind of training. Of four adapters it is ahead by .03, from -.10 to +.17, of
    two by nothing, from -.07 to +.11. The best length depends on the base, which is not at hand:
    where a result can be measured, try --scale 0.85 and 1.1 too. docs/decorrelate.md has the
    tables, and what did not work. What modules do and which read one input is told by their names.
    Many updates with one A, to the last bit, differ in nothing that they read: there a change of
    the input by .001 can change the result by .06.
    """
    role = updates.role if options.role == "auto" else options.role
    near, right, both = PARTS[role]
    read, solved, condition = inputs(updates, options.ridge)
    B = summed(replace(updates, weights=(1.0,) * len(updates.weights)))[0].B
    products = gram(double(B))
    weights = _weights(updates, products)
    # X [*b, s, k] stands for B @ X @ rows, and this one for the weighted sum.
    S = weights * _eye(read)
    alone = products * _between(S, read)
    answered = answers(read, solved)
    agreement = _agreement(by_owner(alone, [factor.rank for factor in updates.factors]))
    if near == 1:
        found, other = corrected(updates, read, solved, answered, right * agreement.crowd)
        return decomposed(found, namespace(B).maximum(condition, other))
    X = weights * answered
    X = X * _unit(products * _between(X, read))
    if both:
        mix, other = _by_outputs(updates, read, products, options.ridge)
        turned = mix @ S
        X = X + turned * _unit(products * _between(turned, read))
        condition = namespace(B).maximum(condition, other)
    X = X * _unit(products * _between(X, read)) * agreement.difference[..., None, None]
    X = X + S * _unit(alone) * (1 - agreement.difference)[..., None, None]
    left = basis(B, products)
    target = left.coefficients @ S
    found = Mixed(left, left.coefficients @ X, target, read.rows, read.products)
    found = _lengthened(found, updates, agreement, options.flatten)
    share = 1 - (1 - near) * agreement.crowd
    if bool(namespace(B).any(share > 0)):
        start, other = corrected(updates, read, solved, answered, right * agreement.crowd)
        found = between(start, found, share)
        condition = namespace(B).maximum(condition, other)
    return decomposed(found, condition)


def _eye(read: Inputs) -> Array:
    """What stands for the updates' own A. [s, k]"""
    mix = read.mix
    found: Array = namespace(mix).eye(*mix.shape[-2:], dtype=mix.dtype, device=mix.device)
    return found[read.own, :]


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
    crowd = xp.clip((effective - 1) / (MANY - 1), max=1.0)
    return Agreement(norms, total, effective, crowd, difference, length)


def _count(norms: Array) -> Array:
    """How many updates are not zero, at least 1. [*b]"""
    xp = namespace(norms)
    count: Array = xp.clip(xp.sum(like(norms > 0, norms), axis=-1), min=1.0)
    return count


def _by_outputs(updates: Updates, read: Inputs, out: Array, ridge: float) -> tuple[Array, Array]:
    """M [*b, s, s] with B M A = sum_t (K + l I)^-1 dW_t dW_t^T dW_t, and the condition. [*b]

    K = sum_t dW_t dW_t^T, each of trace 1; `out` are B^T B. As the inputs of dW_t^T, but that what
    is solved for lies in the span of B, so that nothing of its length is needed.
    """
    into = read.products[..., read.own, read.own]
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


def _lengthened(found: Mixed, updates: Updates, agreement: Agreement, flatten: float) -> Mixed:
    """Raise the leading singular values to a power, and bring these to length.

    Leading are as many as an input has ranks on average: the rest keeps its ratio to the last of
    them, so that a cut to a lower rank takes the same terms as before.
    """
    u, s = singular(found)
    xp = namespace(s)
    here = like(agreement.norms > 0, agreement.norms)
    stored = [float(f.rank) for f in updates.factors]
    ranks = xp.asarray(stored, dtype=s.dtype, device=s.device)
    mean = xp.sum(here * ranks, axis=-1) / _count(agreement.norms)
    leading = like(xp.arange(s.shape[-1], dtype=s.dtype, device=s.device) < mean[..., None], s)
    top = xp.where(s[..., :1] > 0, s[..., :1], xp.ones_like(s[..., :1]))
    ratio = xp.clip(s / top, min=SMALLEST)
    last = xp.min(xp.where(leading > 0, ratio, xp.ones_like(ratio)), axis=-1)[..., None]
    power = (flatten - 1) * (1 - 1 / agreement.effective)
    lift = xp.where(leading > 0, ratio, last) ** power[..., None]
    length = xp.sum((s * lift * leading) ** 2, axis=-1) ** 0.5
    unit = agreement.length / xp.where(length > 0, length, xp.ones_like(length))
    return found._replace(Z=(u * (lift * unit[..., None])[..., None, :]) @ (u.mT @ found.Z))
