"""The exponential moving average of a run's checkpoints."""

from typing import Annotated

from msgspec import Meta

from loramerge.adapter import LowRank, Updates
from loramerge.linalg.factors import concat
from loramerge.options import Options
from loramerge.registry import merger


class EmaOptions(Options, frozen=True):
    """How fast the past is forgotten."""

    decay: Annotated[
        float,
        Meta(
            ge=0,
            le=1,
            description="Weight of a checkpoint against the next one: 1 is the plain mean, 0 the "
            "last checkpoint alone. 0.8 is ours.",
        ),
    ] = 0.8


@merger(
    "ema",
    paper="arXiv:2505.12082",
    options=EmaOptions,
    example="loramerge ema a b --decay 0.9",
    scale="paper",
)
def ema(updates: Updates, options: EmaOptions) -> LowRank:
    """Average checkpoints of one run, the latest most, in the order given (EMA).

    dW = sum_t c_t w_t dW_t with c_t in proportion to decay^(T - t), sum 1; the last adapter is the
    latest. The result is an exact weighted sum, of rank sum_t r_t before it is cut: checkpoints of
    one run have much in common, so that a cut to their rank loses little.

    Where it differs. The paper's EMA is M_t = alpha dW_t + (1 - alpha) M_(t-1), --decay being its
    1 - alpha. A recursion that starts at the first checkpoint leaves it the share decay^(T - 1):
    half of everything, for 4 checkpoints at .8. Ours starts at nothing and is divided by what is
    missing to 1, as Adam's moments are, so that decay 1 is the plain mean. In the paper that plain
    mean did best in the end, as late checkpoints lie close together. Averaging factors A and B, as
    trainers do, adds cross terms; we average dW.
    """
    falling = [options.decay ** (updates.count - 1 - place) for place in range(updates.count)]
    pairs = zip(updates.positions, updates.weights, strict=True)
    shares = [falling[position] * weight / sum(falling) for position, weight in pairs]
    return concat(updates.factors, shares)
