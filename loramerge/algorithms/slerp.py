"""Spherical interpolation between two updates."""

from typing import Annotated

from msgspec import Meta

from loramerge.adapter import LowRank, Updates
from loramerge.algorithms._vectors import angles, combined, weights
from loramerge.linalg.kernels import namespace
from loramerge.options import Options
from loramerge.registry import Score, merger

# Below this sine two updates are one direction to the rounding of float64.
PARALLEL = 1e-6
# Two updates as opposite as this have no shortest way between them (mergekit's threshold).
OPPOSITE = -0.9995


class SlerpOptions(Options, frozen=True):
    """How far to go."""

    t: Annotated[
        float,
        Meta(ge=0, le=1, description="Where on the way: 0 the first adapter, 1 the second."),
    ] = 0.5


@merger(
    "slerp",
    paper="https://doi.org/10.1145/325334.325242, Shoemake 1985",
    options=SlerpOptions,
    example="loramerge slerp a b -t 0.3",
    scale="paper",
    score=Score(0.963, "slerp --rank 16 --scale auto", "two"),
    inputs=2,
    cost="one-shot",
)
def slerp(updates: Updates, options: SlerpOptions) -> LowRank:
    """Interpolate between two updates along the arc between them (SLERP).

    Per module, with theta the angle between x = w_1 dW_1 and y = w_2 dW_2 as vectors of all their
    entries: dW = (sin((1 - t) theta) x + sin(t theta) y) / sin theta. Nothing is approximated: it
    is a weighted sum, of rank r_1 + r_2 before it is cut, and theta is taken from the factors. A
    straight line would shorten what lies at right angles, as adapters of different tasks nearly
    do: two of one length give .71 of it halfway; the arc keeps it.

    Where it differs. Shoemake interpolates unit vectors. Lengths are not interpolated apart here,
    as in mergekit's slerp, which is this formula on full weights, where two fine-tuned models are
    nearly parallel and the arc is a straight line. Like mergekit, updates that are opposite (cosine
    below -0.9995), where every way is the shortest, are taken along the line; nearly parallel ones
    are not, as the arc has the line as its limit. An update that is zero is at right angles.
    """
    _, C = angles(updates)
    xp, w = namespace(C), weights(updates, C)
    cosine = xp.clip(C[..., 0, 1] * xp.sign(w[0] * w[1]), min=-1.0, max=1.0)
    theta = xp.acos(cosine)
    sine = xp.sin(theta)
    curved = (sine > PARALLEL) & (cosine > OPPOSITE)
    safe = xp.where(curved, sine, xp.ones_like(sine))
    shares = [
        xp.where(curved, xp.sin(share * theta) / safe, share * xp.ones_like(sine))
        for share in (1 - options.t, options.t)
    ]
    return combined(updates, w * xp.stack(shares, axis=-1))
