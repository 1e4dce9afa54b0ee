"""Model Stock: how far the mean of a few updates is to be trusted."""

from loramerge.adapter import LowRank, Updates
from loramerge.algorithms._vectors import angles, combined, weights
from loramerge.linalg.kernels import namespace
from loramerge.options import Options
from loramerge.registry import Score, merger


class StockOptions(Options, frozen=True):
    """None of its own."""


@merger(
    "stock",
    paper="arXiv:2403.19522",
    options=StockOptions,
    example="loramerge stock a b",
    scale="paper",
    cost="one-shot",
    score=Score(0.194, "stock --rank 16 --scale auto"),
)
def stock(updates: Updates, options: StockOptions) -> LowRank:
    """Shrink the mean of updates by how far they agree, module by module (Model Stock).

    dW = t * mean_t w_t dW_t with t = T c / (1 + (T - 1) c), c the mean cosine between two of the
    T updates: the point on the way from the base to the mean of fine-tuned models that is nearest
    to the centre they lie around. Copies agree wholly: t = 1. Where c is 0 or less they agree in
    nothing, and t is 0. A module that an adapter lacks is an update of zero there, with cosine 0 to
    the others. The result is an exact weighted sum, of rank sum_t r_t before it is cut.

    Where it differs. The paper has two fine-tuned models, or more with one angle between all; for
    more we take the mean of the cosines, as mergekit does. Both divide by 1 + (T - 1) c, which
    passes through 0 as c falls below it; our c stops at 0. Updates start at the base, so none is
    needed.

    What to expect. It is made for models fine-tuned on one task with several seeds. Adapters of
    different tasks are nearly at right angles: then next to nothing is left of any, eight of them
    answered nothing right. --scale auto brings the whole back to length (exact match .19), with the
    modules where they agree counting most, and those are not what tasks need.
    """
    _, C = angles(updates)
    xp, count = namespace(C), updates.count
    between = xp.sum(C, axis=(-2, -1)) - xp.sum(xp.linalg.diagonal(C), axis=-1)
    cosine = xp.clip(between / max(count * (count - 1), 1), min=0.0, max=1.0)
    if count == 1:
        cosine = xp.ones_like(cosine)
    share = cosine / (1 + (count - 1) * cosine)
    return combined(updates, share[..., None] * weights(updates, C))
