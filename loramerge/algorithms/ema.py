"""The exponential moving average of a run's checkpoints."""

from typing import Annotated

from msgspec import Meta

from loramerge.adapter import LowRank, Updates
from loramerge.linalg.factors import concat
from loramerge.options import Options
from loramerge.registry import Score, merger


class EmaOptions(Options, frozen=True):
    """How fast the past is forgotten."""

    decay: Annotated[
        float,
        Meta(
            ge=0,
            le=1,
            description="Weight of a checkpoint against the next one, the paper's 1 - alpha: 1 is "
            "the plain mean, 0 the last checkpoint alone. 0.8 is the better of the paper's two.",
        ),
    ] = 0.8


@merger(
    "ema",
    paper="arXiv:2505.12082",
    options=EmaOptions,
    example="loramerge ema a b --decay 0.9",
    scale="paper",
    score=Score(0.997, "ema --rank 16 --scale paper", "run"),
)
def ema(updates: Updates, options: EmaOptions) -> LowRank:
    """Average checkpoints of one run, the latest most, in the order given (EMA).

    dW = sum_t c_t w_t dW_t with c_t in proportion to decay^(T - t), sum 1; the last adapter is the
    latest. The result is an exact weighted sum, of rank sum_t r_t before it is cut: checkpoints of
    one run have much in common, so that a cut to their rank loses little.

    Where it differs. The paper has two forms: M_t = alpha dW_t + (1 - alpha) M_(t-1) from the first
    checkpoint on (its equation 4), which leaves that one the share (1 - alpha)^(T - 1), half of
    everything for 4 checkpoints at .8; and shares of alpha (1 - alpha)^(T - t) (its section 4.2),
    whose sum is short of 1. Ours are the second, divided by their sum, so that decay 1 is the plain
    mean. Averaging factors A and B, as trainers do, adds cross terms; we average dW.

    What to expect. In the paper alpha .2 did better than .1 early in a run; late in it EMA, linear
    weights and the plain mean are all within .3 points of each other. Here, too: two checkpoints
    that answer .993 and .999 give .997 by this, by the plain sum and by every spectral rule.
    """
    falling = [options.decay ** (updates.count - 1 - place) for place in range(updates.count)]
    pairs = zip(updates.positions, updates.weights, strict=True)
    shares = [falling[position] * weight / sum(falling) for position, weight in pairs]
    return concat(updates.factors, shares)
