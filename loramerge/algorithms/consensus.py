"""Consensus merging: keep the entries that several adapters use."""

from typing import Annotated

from msgspec import Meta

from loramerge.adapter import Array, LowRank, Updates
from loramerge.algorithms._census import CENSUS
from loramerge.algorithms._options import SparseOptions, has_every_rank
from loramerge.algorithms._rules import merge_entries
from loramerge.linalg.kernels import like, namespace
from loramerge.linalg.spectrum import Spectrum
from loramerge.options import Count
from loramerge.registry import Score, merger


class ConsensusOptions(SparseOptions, frozen=True):
    """When an adapter uses an entry, and how many must."""

    threshold: Annotated[
        float,
        Meta(
            ge=0,
            description="An adapter uses an entry whose magnitude is at least this share of what "
            "the others add to it (the paper's lambda, chosen there by task from 0.2 to 0.6).",
        ),
    ] = 0.2
    users: Annotated[
        Count, Meta(description="Keep entries that at least so many adapters use (paper: 2).")
    ] = 2


@merger(
    "consensus",
    paper="arXiv:2405.07813",
    options=ConsensusOptions,
    example="loramerge consensus a b",
    scale="auto",
    every_rank=has_every_rank,
    census=CENSUS,
    place="entries",
    cost="iterative",
    score=Score(0.500, "consensus --rank 16 --scale auto"),
)
def consensus(updates: Updates, options: ConsensusOptions) -> LowRank | Spectrum:
    """Sum the updates where several use an entry, drop the rest (Consensus Merging, TALL masks).

    In the coordinates of --space let x_t be w_t dW_t and s their sum. Adapter t uses an entry where
    |x_t| >= threshold |s - x_t|, its TALL mask. Entries that fewer than --users adapters use are
    dropped: catastrophic ones (used by none) and selfish ones (used by one). Of the others the sum
    is kept. One adapter alone uses all of its entries, and comes back.

    Where it differs. The paper chooses the threshold of each task, and a factor on the result, by
    validation accuracy; without data it is one number, and the length that of --scale. The paper's
    mask has > for >=, which differs where all is 0. Its entries are those of full weights, --space
    dense. With --sparsify magnitude each update is trimmed first, as its code can.

    What to expect. Of eight adapters merged into one of rank 16, measured, exact match is .50, and
    .53 for their plain sum: LoRA updates have few entries of use to none or to one. T adapters that
    agree use no entry where threshold > 1 / (T - 1): each is compared with the sum of the others.
    """

    def rule(values: Array) -> Array:
        xp = namespace(values)
        total = xp.sum(values, axis=0)
        used = xp.abs(values) >= options.threshold * xp.abs(total - values)
        enough = xp.count_nonzero(used, axis=0) >= min(options.users, updates.count)
        kept: Array = total * like(enough, values)
        return kept

    return merge_entries(updates, options, options.space, rule)
