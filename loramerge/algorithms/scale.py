"""An update times a number."""

from typing import Annotated

from msgspec import Meta

from loramerge.adapter import LowRank, Updates
from loramerge.linalg import factors
from loramerge.options import Options
from loramerge.registry import compressor, never


class ScaleOptions(Options, frozen=True):
    """By how much."""

    factor: Annotated[
        float, Meta(description="What the update is multiplied by; may be negative.")
    ] = 1.0


@compressor(
    "scale",
    paper="arXiv:2212.04089",
    options=ScaleOptions,
    example="loramerge scale my-adapter --factor 0.5",
    surgery=True,
    exact=never,
)
def scale(updates: Updates, options: ScaleOptions) -> LowRank:
    """Multiply an adapter by a number.

    dW' = factor * dW, at the rank it has: exact but for the rounding of B to the stored dtype, and
    exact altogether where the factor is a power of two. A negative factor turns the update round,
    to take a task away from a model (task negation).
    """
    whole = factors.concat(updates.factors, updates.weights)
    return factors.scale(whole, options.factor)
