"""Decorrelate: a regression that undoes the overlap of what adapters read and write."""

from typing import Annotated, Literal, NamedTuple

from msgspec import Meta
from msgspec.structs import replace

from loramerge.adapter import Array, LowRank, Updates
from loramerge.algorithms._orthogonal import orthogonal_sum
from loramerge.linalg.factors import by_owner, concat, doubled, grams
from loramerge.linalg.kernels import double, gram, like, namespace
from loramerge.linalg.spectrum import Spectrum, decompose
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
    ] = 0.4
    sides: Annotated[
        Literal["auto", "input", "both", "none"],
        Meta(
            description="Where updates are told apart: by what they read (input), by that and what "
            "they write (both), or nowhere: as tsv does (none). auto goes by names: both for "
            "queries, keys and outputs of attention, input for values, none elsewhere."
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


class Part(NamedTuple):
    """A regression, what makes it of length 1, and the condition of its inverse. Both [*b]

    The condition is that on the inputs there are, the span of F's rows.
    """

    update: LowRank
    unit: Array
    condition: Array


@merger(
    "decorrelate",
    paper="ours",
    options=DecorrelateOptions,
    example="loramerge decorrelate a b --rank 16",
    scale="paper",
    place="thin",
    cost="one-shot",
    score=Score(0.679, "decorrelate --rank 16 --scale paper"),
    siblings=True,
)
def decorrelate(updates: Updates, options: DecorrelateOptions) -> Spectrum:
    """Regress updates of attention on what each has learned from, read off the adapters alone.

    What a merged W should do is answer every task's inputs as that task's update does: minimise
    sum_t tr((W - dW_t) G_t (W - dW_t)^T) over W, G_t the covariance of task t's inputs. No inputs
    are at hand, but training leaves their trace: dW_t is a sum of gradients times inputs, so
    dW_t^T dW_t is large where inputs are. With G_t = mean_j dW_tj^T dW_tj / ||dW_tj||^2 over the
    modules j of adapter t that read the same input (q, k, v; gate, up; any other module alone),
    W = (sum_t w_t dW_t G_t) (H + ridge tr(H)/n I)^-1,  H = sum_t G_t.
    So each update keeps its B and gets another A: what several updates listen to is shared out,
    what one alone listens to stays its own. The same on the output side, of dW_t^T, gives another
    B to each A; queries, keys and output projections of attention get half of both, each of unit
    length, values the first alone. All other modules are merged as by `tsv`: in an MLP every task
    reads the same inputs, and shared out among eight they are too weak to do what they did.

    Then the leading singular values (as many as an input has ranks on average) are raised to the
    power `flatten`, which keeps the directions of quiet tasks from drowning, and brought to the
    length min(||S||, (sum_t n_t)^2 / (T ||S||)), S the weighted sum and n_t = ||w_t dW_t||: that of
    the sum for updates at right angles, of one for copies.

    Copies need no decorrelation. With T_eff = (sum_t n_t)^2 / ||S||^2 in [1, T] and
    d = (1 - 1/T_eff) / (1 - 1/T), the regression has share d and S share 1 - d, each of unit
    length. Few tasks drown less than many: the power is 1 - (1 - 1/T_eff) (1 - flatten). One
    adapter, or T copies, come back unchanged, and checkpoints of one run are nearly averaged.

    Where it differs. RegMean (arXiv:2212.09849) has the inputs. WUDI (arXiv:2503.08099) takes each
    module's own update and a pseudo-inverse, which collapses where adapters share their initial A.
    Everything is computed from factors: n x n matrices are never formed (Woodbury).

    The condition in the report is that of H + ridge tr(H)/n I on the inputs there are. Copies raise
    it, and it does no harm there: nothing of them is told apart.

    What to expect. Made for many adapters of different tasks and an output of one adapter's rank:
    eight into rank 16 score .64 on average over four kinds of training (`tsv` .57). On tasks that
    nothing was chosen on it is ahead of `tsv` by .03 on average and on every kind of training, and
    behind by up to .03 on some sets. Of four adapters `tsv` makes more. docs/decorrelate.md has the
    tables, and what did not work. With --sides input or both the regression is at work in every
    module, which is better on some sets of tasks by .1 and worse on others by .2. What modules do
    and which read one input is told by their names; where names say nothing it is `tsv`.
    """
    sides = updates.sides if options.sides == "auto" else options.sides
    if sides == "none":
        return orthogonal_sum(updates)
    updates = replace(updates, factors=tuple(map(doubled, updates.factors)))
    whole = concat(updates.factors, updates.weights)
    known = grams(whole)
    agreement = _agreement(by_owner(known.B * known.A, _ranks(updates)))
    parts = [_regressed(updates, whole, options.ridge)]
    if sides == "both":
        turned = replace(updates, factors=tuple(map(_turned, updates.factors)), siblings=())
        part = _regressed(turned, concat(turned.factors, turned.weights), options.ridge)
        parts.append(part._replace(update=_turned(part.update)))
    found = decompose(_blended(whole, parts, agreement))
    condition = parts[0].condition
    for part in parts[1:]:
        condition = namespace(condition).maximum(condition, part.condition)
    return replace(_lengthened(found, updates, agreement, options.flatten), condition=condition)


def _turned(update: LowRank) -> LowRank:
    """dW^T."""
    return LowRank(A=update.B.mT, B=update.A.mT)


def _ranks(updates: Updates) -> list[int]:
    return [factor.rank for factor in updates.factors]


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


def _inputs(updates: Updates, place: int) -> list[Array]:
    """Blocks [*b, r_j, n] of F_t, with G_t = F_t^T F_t the stand-in for a task's covariance."""
    members = (updates.factors[place], *(updates.siblings[place] if updates.siblings else ()))
    xp = namespace(members[0].A)
    blocks = []
    for member in members:
        G = gram(member.B)
        energy = xp.sum(G * gram(member.A.mT), axis=(-2, -1)) * len(members)
        values, E = xp.linalg.eigh(G / xp.where(energy > 0, energy, 1 + energy)[..., None, None])
        root = E * (xp.clip(values, min=0.0) ** 0.5)[..., None, :]
        blocks.append(root.mT @ double(member.A))
    return blocks


def _regressed(updates: Updates, whole: LowRank, ridge: float) -> Part:
    """sum_t w_t dW_t G_t (H + l I)^-1, l = ridge tr(H)/n; `whole` is the weighted sum.

    In thin space (Woodbury): with F = [F_1; ..; F_T] and H = F^T F, F_t (F^T F + l I)^-1 is rows of
    (F F^T + l I)^-1 F.
    """
    inputs = [_inputs(updates, place) for place in range(len(updates.factors))]
    xp = namespace(inputs[0][0])
    F = xp.concat([block for blocks in inputs for block in blocks], axis=-2)
    K = F @ F.mT
    energy = xp.sum(xp.linalg.diagonal(K), axis=-1) / F.shape[-1]
    energy = xp.where(energy > 0, energy, xp.ones_like(energy)) * ridge
    eye = xp.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    # Small beside F: an inverse of its own costs a tenth of solving for all of F's columns.
    inverse = xp.linalg.inv(K + energy[..., None, None] * eye)
    rows, start = [], 0
    for update, blocks in zip(updates.factors, inputs, strict=True):
        stop = start + sum(block.shape[-2] for block in blocks)
        rows.append((update.A @ F[..., start:stop, :].mT) @ inverse[..., start:stop, :])
        start = stop
    mix = xp.concat(rows, axis=-2)
    values = xp.linalg.eigvalsh(K)
    least = xp.clip(values[..., -min(F.shape[-2:])], min=0.0)
    return Part(
        update=LowRank(A=mix @ F, B=whole.B),
        unit=_unit(by_owner(gram(whole.B) * (mix @ K @ mix.mT), _ranks(updates))),
        condition=(values[..., -1] + energy) / (least + energy),
    )


def _unit(P: Array) -> Array:
    """What makes a sum of updates of length 1, from their inner products P; 0 for nothing."""
    xp = namespace(P)
    square, size = xp.sum(P, axis=(-2, -1)), xp.sum(xp.linalg.diagonal(P), axis=-1)
    clear = square > CANCELLED * size
    root = xp.where(clear, square, xp.ones_like(square)) ** -0.5
    found: Array = xp.where(clear, root, xp.zeros_like(root))
    return found


def _blended(whole: LowRank, parts: list[Part], agreement: Agreement) -> LowRank:
    """The regression, and as much of the sum as the updates agree, each of unit length.

    Of two regressions it is half of each.
    """
    xp = namespace(agreement.total)
    first, *others = parts
    unit = agreement.difference
    for part in others:
        across = (first.update.B.mT @ part.update.B) * (first.update.A @ part.update.A.mT)
        cosine = first.unit * part.unit * xp.sum(across, axis=(-2, -1))
        live = like(first.unit > 0, unit) + like(part.unit > 0, unit) + 2 * cosine
        unit = unit * xp.where(live > CANCELLED, live, xp.ones_like(live)) ** -0.5
    rest = (1 - agreement.difference) / xp.where(
        agreement.total > 0, agreement.total, xp.ones_like(unit)
    )
    share = (first.unit * unit)[..., None, None]
    blended = LowRank(share * first.update.A + rest[..., None, None] * whole.A, whole.B)
    return concat(
        [blended, *(part.update for part in others)], [1.0, *(p.unit * unit for p in others)]
    )


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
