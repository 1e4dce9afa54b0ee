"""TIES-Merging: trim, elect a sign, average what agrees."""

from typing import Annotated

from msgspec import Meta

from loramerge.adapter import Array, LowRank, Updates
from loramerge.algorithms._rules import disjoint_mean, elect_sign, merge_entries
from loramerge.algorithms._sparsify import SparseOptions, Sparsify, has_every_rank
from loramerge.linalg.spectrum import Spectrum
from loramerge.registry import merger


class TiesOptions(SparseOptions, frozen=True):
    """What is trimmed, and in which coordinates."""

    sparsify: Annotated[
        Sparsify,
        Meta(
            description="How each update is trimmed: to its largest entries (magnitude, the "
            "paper's), at random (dare), at random by size (della), by both ends (breadcrumbs), "
            "not at all (none)."
        ),
    ] = "magnitude"


@merger(
    "ties",
    paper="arXiv:2306.01708",
    options=TiesOptions,
    example="loramerge ties a b --density 0.3 --rank 16",
    scale="auto",
    every_rank=has_every_rank,
)
def ties(updates: Updates, options: TiesOptions) -> LowRank | Spectrum:
    """Trim each update, elect a sign per entry, average the entries that agree (TIES)."""

    def rule(values: Array) -> Array:
        return disjoint_mean(values, elect_sign(values))

    return merge_entries(updates, options, rule)
