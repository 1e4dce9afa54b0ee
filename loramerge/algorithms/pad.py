"""An update at a larger rank."""

from typing import Annotated, Literal

from msgspec import Meta

from loramerge.adapter import LowRank, Updates
from loramerge.linalg import factors
from loramerge.options import Options
from loramerge.registry import always, compressor


class PadOptions(Options, frozen=True):
    """What the new terms hold."""

    padding: Annotated[
        Literal["zero", "trainable"],
        Meta(
            description="zero: A and B are zero there. trainable: A is drawn as for a new adapter "
            "and B is zero, so that the padding can be trained."
        ),
    ] = "zero"

    @property
    def needs_rank(self) -> str | None:
        """Padding is to one rank for all modules."""
        return "padding"

    @property
    def trains_on(self) -> bool:
        """A term of which both factors are zero has no gradient, and would stay so."""
        return self.padding == "trainable"


@compressor(
    "pad",
    paper="arXiv:2311.03285, S-LoRA, which serves adapters at one rank",
    options=PadOptions,
    example="loramerge pad my-adapter --rank 32",
    surgery=True,
    exact=always,
    every_rank=always,
)
def pad(updates: Updates, options: PadOptions) -> LowRank:
    """Pad an adapter to a larger rank, exactly.

    Zero terms are added up to --rank, without it up to the largest rank of its modules. The update
    stays the same, to the bit where the file stores a scale of 1. A rank below that of the adapter
    is refused.

    Zero terms stay zero in training: where A and B are both zero, so are their gradients. With
    --padding trainable, A is drawn there as for a new adapter, and B alone is zero.
    """
    whole = factors.concat(updates.factors, updates.weights)
    return whole if updates.rank is None else factors.pad(whole, updates.rank)
