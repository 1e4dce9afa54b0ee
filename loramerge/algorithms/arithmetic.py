"""Task arithmetic: the weighted sum of updates, exactly."""

from loramerge.adapter import LowRank, Updates
from loramerge.linalg.factors import concat
from loramerge.options import Options
from loramerge.registry import Preset, merger


class ArithmeticOptions(Options, frozen=True):
    """None of its own: weights, --lambda and --rank say everything."""


@merger(
    "arithmetic",
    paper="arXiv:2212.04089",
    options=ArithmeticOptions,
    example="loramerge arithmetic a b -w 1 -w -0.5 --rank 16",
    scale="paper",
    exact=True,
    presets=(Preset("cat", {"rank": "full"}, "The weighted sum with every rank kept: exact."),),
)
def arithmetic(updates: Updates, options: ArithmeticOptions) -> LowRank:
    """Add the updates up, each times its weight (task arithmetic, or negation).

    dW = lambda * sum_t w_t dW_t, with rank sum_t r_t before --rank cuts it to its best
    approximation. Weights may be negative. With --rank full the factors are concatenated and
    nothing is lost: PEFT's `cat`.

    Where it differs. PEFT's `linear` adds the factors A and B instead of the updates, which adds
    cross terms B_i A_j that belong to no adapter; it is not offered. The paper scales the sum of
    full-weight task vectors by a lambda chosen on validation data; ours is 1 unless --lambda says
    otherwise.
    """
    return concat(updates.factors, updates.weights)
