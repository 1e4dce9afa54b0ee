"""LoRA-Squeeze: one adapter at a smaller rank."""

from typing import Annotated, Literal, TypeAlias

from msgspec import Meta

from loramerge.adapter import LowRank, Updates
from loramerge.errors import GateError
from loramerge.linalg.dense import SMALL, compress
from loramerge.linalg.factors import concat
from loramerge.linalg.spectrum import Spectrum, randomized
from loramerge.options import Options
from loramerge.registry import Score, compressor

Schedule: TypeAlias = Annotated[str, Meta(pattern=r"^[1-9]\d*(,[1-9]\d*)*$")]


class SqueezeOptions(Options, frozen=True):
    """How small, where it is not --rank that says it, and how it is computed."""

    step: Annotated[
        Schedule | None,
        Meta(
            description="The ranks of a schedule: squeeze to the next one below the adapter's own, "
            "to train on with. Exit code 3 where there is none left.",
            extra={"metavar": "N,N,...", "expected": "ranks with commas between, such as 64,32,16"},
        ),
    ] = None
    svd: Annotated[
        Literal["exact", "randomized"],
        Meta(
            description="exact: from the factors, optimal and faster; of an update of full rank (a "
            "DoRA, an extracted one) by a Krylov space, within 0.1 % of the optimum. randomized: "
            "the paper's, for comparison; it needs --rank."
        ),
    ] = "exact"
    oversample: Annotated[
        int, Meta(ge=0, description="Extra columns of the randomized range finder (paper: 10).")
    ] = 10
    power: Annotated[
        int, Meta(ge=0, description="Power iterations of the randomized range finder (paper: 2).")
    ] = 2

    @property
    def needs_rank(self) -> str | None:
        """The randomized range finder must know how many columns to draw."""
        return "--svd randomized" if self.svd == "randomized" else None

    @property
    def bound(self) -> str | None:
        """The schedule."""
        return "--step" if self.step else None

    def rank_below(self, highest: int) -> int | None:
        """The next rank of the schedule. Raises GateError where it has ended."""
        if self.step is None:
            return None
        lower = [rank for rank in map(int, self.step.split(",")) if rank < highest]
        if not lower:
            raise GateError(
                f"The schedule {self.step} ends here: the adapter has rank {highest} already.",
                "nothing was written; the adapter is done, or --step needs a smaller rank",
            )
        return max(lower)

    @property
    def trains_on(self) -> bool:
        """Between two steps of a schedule the adapter is trained."""
        return self.step is not None


@compressor(
    "squeeze",
    paper="arXiv:2602.10993",
    options=SqueezeOptions,
    example="loramerge squeeze my-adapter --rank 8",
    score=Score(0.956, "squeeze --rank 4", "joint"),
)
def squeeze(updates: Updates, options: SqueezeOptions) -> LowRank | Spectrum:
    """Recompress an adapter to the best approximation of a smaller rank.

    dW = B A = U S Vh from QR or Gram matrices of the factors (Algorithm 2 of the paper), cut to
    the chosen rank: B' = U S^1/2, A' = S^1/2 Vh, alpha = rank. No approximation of that rank is
    nearer (Eckart-Young-Mirsky); what is lost is printed.

    Where it differs. The paper uses randomized SVD with oversampling 10 and 2 power iterations;
    the exact core is faster at LoRA's ranks and is the default. The paper does not say how the
    singular values are split nor what becomes of alpha; we split them evenly and keep alpha / r.
    PEFT's `svd` and kohya's resize_lora decompose the dense delta weight, which takes minutes where
    this takes a second, and leave all singular values to B; mergekit extracts from full weights.

    Between stages of training, --step 64,32,16 takes the next lower rank of the schedule, so that
    the same line is typed after each (In-Squeeze; once at the end is Post-Squeeze, trained on for a
    while Cont-Squeeze). Terms a module lacks begin as in PEFT, A random and B zero, so that none is
    dead. alpha is the rank: where yours was twice that, a step of Adam goes 0.7 times as far.

    What to expect. The paper's claim, that squeezing a large rank beats training the small one,
    holds for short training (of the testbed's sh3_rev .850 at rank 2 against .205 after 60 steps);
    at convergence and for ranks of 1 or 2 direct training is better (1.000 against .982).
    Retained energy is no measure of task quality.
    """
    update = concat(updates.factors, updates.weights)
    if options.svd == "exact":
        whole = update.rank >= min(update.B.shape[-2], update.A.shape[-1]) > SMALL
        return compress(update.B @ update.A, updates.rank, updates.seed) if whole else update
    assert updates.rank is not None  # needs_rank
    return randomized(update, updates.rank, options.oversample, options.power, updates.seed)
