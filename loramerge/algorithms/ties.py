"""TIES-Merging: trim, elect a sign, average what agrees."""

from typing import Annotated

from msgspec import Meta

from loramerge.adapter import Array, LowRank, Updates
from loramerge.algorithms._census import CENSUS
from loramerge.algorithms._options import SparseOptions, Sparsify, has_every_rank
from loramerge.algorithms._rules import disjoint_mean, elect_sign, merge_entries
from loramerge.linalg.spectrum import Spectrum
from loramerge.registry import Score, merger


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
    census=CENSUS,
    place="entries",
    cost="iterative",
    score=Score(0.473, "ties --space knots --density 0.2 --rank 16 --scale auto"),
)
def ties(updates: Updates, options: TiesOptions) -> LowRank | Spectrum:
    """Trim each update, elect a sign per entry, average what agrees (TIES-Merging).

    In the coordinates of --space let x_t be w_t dW_t less the entries that --sparsify takes away.
    Per entry the sign of sum_t x_t is elected: the side of the larger mass, not of the larger
    number; a sum of 0 elects +. The result is the sum of the x_t of that sign over the number of
    them. So weights enter before the election, may be negative, and are no divisor. Updates are
    trimmed module by module: exactly ceil(density n) of n entries stay, of equal ones the first.
    With --trim-scope model n are all entries of an adapter, magnitudes are compared in float32, and
    modules come in the order of their names.

    Spaces. dense: entries of the delta weights, as in the paper. knots (arXiv:2410.19735): entries
    of Z_t in [dW_1 .. dW_T] = U [Z_1 .. Z_T], U the left singular vectors; the result is U Z.
    core (arXiv:2509.17786): entries of U^T dW_t V, V the right singular vectors of the stacked
    updates; the result is U M V^T. These two are computed from the factors and have rank
    sum_t r_t at most. A dense result has every rank: it is held in full for one module at a time,
    made from tiles of rows, then cut to --rank, exactly where a side of the module is at most
    1024, else by a block Krylov method whose error is within 0.1 % of the least. Without a --rank
    to cut to (--energy, --size, --rank full) it is decomposed whole, which takes a minute for a
    module of 14336 x 4096.

    Where it differs. The paper and KnOTS trim over the whole model (--trim-scope model), PEFT and
    mergekit per tensor, which is our default. PEFT's `ties` merges the factors A and B, and elects
    before it weighs; mergekit divides by the sum of the agreeing weights. For delta weights of
    equal weight (1 for mergekit) all agree but for the rounding of density n. Core Space takes its
    axes from the factors as they are stored, so that its result depends on how a file splits its
    update; ours are those of the updates, and score the same.

    What to expect. Density 0.2 is the paper's. For eight adapters in one of rank 16, measured:
    core is ahead of knots (0.56 against 0.47 exact match), which gains with density (0.54 at 0.5);
    dense is far behind (0.25), since the cut to a low rank takes most of it away. The scope moves
    none of these by more than 0.02.
    """

    def rule(values: Array) -> Array:
        return disjoint_mean(values, elect_sign(values))

    return merge_entries(updates, options, options.space, rule)
