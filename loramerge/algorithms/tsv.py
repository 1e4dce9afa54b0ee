"""TSV-M: the singular vectors of all updates, made orthogonal to each other."""

from typing import Annotated

from msgspec import Meta

from loramerge.adapter import Updates
from loramerge.algorithms._orthogonal import Smoothing, orthogonal_sum
from loramerge.linalg.spectrum import Spectrum
from loramerge.options import Options
from loramerge.registry import Score, always, merger


class TsvOptions(Options, frozen=True):
    """What becomes of the spectra."""

    smooth: Annotated[
        Smoothing,
        Meta(
            description="Spectrum of each update, its sum kept (DC-Merge): as it is (none), all "
            "singular values equal (average), or falling in a straight line (linear)."
        ),
    ] = "none"


def is_flat(options: TsvOptions) -> bool:
    """Whether the singular values of each update become equal."""
    return options.smooth == "average"


@merger(
    "tsv",
    paper="arXiv:2412.00081",
    options=TsvOptions,
    example="loramerge tsv a b --rank 16",
    scale="paper",
    place="thin",
    cost="one-shot",
    flat=is_flat,
    orthogonal=always,
    score=Score(0.604, "tsv --rank 16 --scale paper"),
)
def tsv(updates: Updates, options: TsvOptions) -> Spectrum:
    """Make the singular vectors of all updates orthogonal to each other, then add up (TSV-M).

    w_t dW_t = U_t S_t V_t^T, U = [U_1 .. U_T], V = [V_1 .. V_T], S all S_t on one diagonal. With
    U = P D Q^T let U' = P Q^T, the orthonormal vectors nearest to those of U (whitening, or
    orthogonal Procrustes), and V' likewise. The result is U' S V'^T: no update is longer or
    shorter for it, and none stands in another's way. All ranks of an update take part; where those
    of all exceed a side of the module, the largest singular values that fit. A weight scales S_t
    and may be negative.

    Where it differs. Updates that overlap make U nearly singular, and P Q^T leaps with the last
    digit of the input: four copies of one adapter come out 1.7 times as far from it as it is long,
    two checkpoints of one run with twice their energy. Here a singular value d of U below 0.3
    becomes d / 0.3 instead of 1, so that a change of the input by 1e-3 changes the result by no
    more than 1e-2; T copies of an adapter come back as that adapter. Above 0.3 nothing differs.
    Zero-padded ranks take no part. The published code takes min(m, n) / T singular vectors of each
    update, null space included: for LoRA another method, and a worse one.

    The condition in the report is that of the Gram matrix of all terms u_i v_i^T: 1 where updates
    have nothing in common, without bound for copies.

    What to expect. The best published rule at its own length, with no lambda to choose: eight
    adapters in one score .64 exact match with every rank and .60 cut to rank 16, the sum at its
    best lambda .53 there. --smooth only loses on these: linear .28 and .00, average .07 and .00.
    --calibrate gains .01 to .03 here and loses .11 after gentle training: docs/calibrations.md.
    """
    return orthogonal_sum(updates, options.smooth)
