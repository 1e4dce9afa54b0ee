"""One update less what lies in the span of others."""

from typing import Annotated, Literal

from msgspec import Meta
from msgspec.structs import replace

from loramerge.adapter import LowRank, Updates
from loramerge.algorithms._spaces import encode
from loramerge.linalg.factors import scale
from loramerge.linalg.kernels import double, like
from loramerge.options import Options
from loramerge.registry import merger


class ProjectOptions(Options, frozen=True):
    """On which side."""

    side: Annotated[
        Literal["output", "input", "both"],
        Meta(
            description="What is removed: outputs that the others write to, inputs that they read "
            "from, or both."
        ),
    ] = "output"


@merger(
    "project",
    paper="arXiv:2310.14152, which trains adapters in orthogonal subspaces",
    options=ProjectOptions,
    example="loramerge project a b --side both",
    scale="paper",
    surgery=True,
    removes=True,
)
def project(updates: Updates, options: ProjectOptions) -> LowRank:
    """Remove from the first adapter what lies in the span of the others.

    Per module, with P the projection on the columns of all others' dW_t, and Q on their rows:
    (1 - P) w_1 dW_1 for the output side, w_1 dW_1 (1 - Q) for the input side, both for both. The
    others are only looked at: their weights do not matter, but that one of weight 0 has no span.
    The rank is that of the first. Directions below 1e-5 of the others' largest are no span. Energy
    and error in the report are against the first adapter: what was removed.

    Where the first lacks a module, nothing is left; where all others do, all of it.
    """
    first = 0 in updates.positions
    others = updates.factors[first:]
    own = scale(updates.factors[0], updates.weights[0] if first else 0.0)
    if not first or not others:
        return own
    weights = tuple(float(weight != 0) for weight in updates.weights[1:])
    stack = encode(replace(updates, factors=others, weights=weights, keys=()), "core")
    left, right = stack.left, stack.right
    assert left is not None
    assert right is not None
    A, B = double(own.A), double(own.B)
    if options.side != "input":
        B = B - left @ (left.mT @ B)
    if options.side != "output":
        A = A - (A @ right.mT) @ right
    return LowRank(A=like(A, own.A), B=like(B, own.B))
