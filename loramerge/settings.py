"""The settings every computing command shares, declared once, in the groups help shows."""

from typing import Annotated, Literal, TypeAlias

from msgspec import Meta

from loramerge.linalg.calibrations import CalibrationName
from loramerge.linalg.ranks import Allocation
from loramerge.linalg.scales import ScaleName
from loramerge.options import Count, Factor, Options, Ratio, Share
from loramerge.weights import EXPECTED

__all__ = [
    "BOUNDS",
    "GROUPS",
    "REFINEMENTS",
    "RULES",
    "ComputeDtype",
    "MergeSettings",
    "SaveDtype",
    "Settings",
]

# The rules of kohya's resize_lora, beside which --rank is the most that any module gets.
RULES = ("sv_ratio", "sv_cumulative", "sv_fro")
# What bounds the rank of a result: otherwise at most one of them is given.
BOUNDS = ("rank", "energy", "max_error", "size", *RULES)
# What says more about ranks that are chosen.
REFINEMENTS = ("round_to", "allocate", "compat")

RANK = "Rank of the result"
MERGE = "Merge"
INPUT = "Input"
OUTPUT = "Output"
COMPUTING = "Computing"
GROUPS = (RANK, MERGE, INPUT, OUTPUT, COMPUTING)


def _says(group: str, description: str, **extra: str) -> Meta:
    """A setting's group, its sentence, and what help and errors call its value."""
    return Meta(description=description, extra={"group": group, **extra})


SaveDtype: TypeAlias = Annotated[
    Literal["auto", "float32", "float16", "bfloat16"],
    _says(OUTPUT, "Stored dtype; auto is the inputs' common one."),
]
ComputeDtype: TypeAlias = Annotated[
    Literal["float32", "float64"], _says(COMPUTING, "Dtype of the factors while computing.")
]


class Settings(Options, frozen=True):
    """What every computing command takes."""

    rank: Annotated[
        Count | Literal["max", "full"] | None,
        _says(RANK, "A number, max (the largest input rank) or full (lossless).", short="-r"),
    ] = None
    energy: Annotated[
        Share | None, _says(RANK, "Keep this share of the squared singular values.")
    ] = None
    max_error: Annotated[
        Share | None,
        _says(
            RANK, "Largest relative Frobenius error of any module; exit code 3 if it is not met."
        ),
    ] = None
    size: Annotated[
        str | None,
        _says(RANK, "Largest file to write, such as 20MB, 5MiB or 300k.", metavar="SIZE"),
    ] = None
    sv_ratio: Annotated[
        Ratio | None,
        _says(
            RANK,
            "Keep the singular values above the largest divided by this, in each module, up to "
            "--rank.",
        ),
    ] = None
    sv_cumulative: Annotated[
        Share | None,
        _says(RANK, "Keep this share of the sum of singular values of each module, up to --rank."),
    ] = None
    sv_fro: Annotated[
        Share | None,
        _says(RANK, "Keep this share of the Frobenius norm of each module, up to --rank."),
    ] = None
    round_to: Annotated[
        Count | None,
        _says(
            RANK,
            "Choose multiples of this, or all ranks a module has: rounded up where something must "
            "be kept, never beyond --size or --rank.",
        ),
    ] = None
    compat: Annotated[
        Literal["kohya"] | None,
        _says(
            RANK,
            "kohya: --sv-ratio, --sv-cumulative and --sv-fro give the ranks of its resize_lora, "
            "one more than needed.",
        ),
    ] = None
    allocate: Annotated[
        Allocation | None,
        _says(
            RANK,
            "Spread ranks over modules by a score per parameter: relative (s/|dW|)^2 is the "
            "safest, sigma s, energy s^2; uniform: one rank for all.",
        ),
    ] = None
    layout: Annotated[
        Literal["uniform", "pattern"] | None,
        _says(
            RANK,
            "uniform: one stored rank, zero-padded. pattern: a rank per module, smaller, but wrong "
            "in vLLM, SGLang and PEFT's hotswap. Default: uniform, or pattern where ranks are "
            "chosen per module.",
        ),
    ] = None
    include: Annotated[
        tuple[str, ...],
        _says(
            INPUT,
            "Only modules whose name matches this glob, in which 0-7 stands for any of these "
            "numbers; repeatable.",
            metavar="GLOB",
        ),
    ] = ()
    exclude: Annotated[
        tuple[str, ...],
        _says(INPUT, "Leave out modules whose name matches this glob; repeatable.", metavar="GLOB"),
    ] = ()
    to: Annotated[
        str,
        _says(OUTPUT, "Layout to write: same, or one of `loramerge layouts`.", metavar="LAYOUT"),
    ] = "same"
    save_dtype: SaveDtype = "auto"
    device: Annotated[
        str,
        Meta(
            description="auto, cpu or cuda[:N]; auto takes a GPU where it pays: --space dense.",
            pattern=r"^(auto|cpu|cuda(:\d+)?)$",
            extra={
                "group": COMPUTING,
                "metavar": "DEVICE",
                "expected": "auto, cpu, cuda or cuda:N",
            },
        ),
    ] = "auto"
    compute_dtype: ComputeDtype = "float32"
    seed: Annotated[
        int,
        Meta(
            description="Seed of everything random.",
            ge=0,
            le=2**32 - 1,
            extra={"group": COMPUTING},
        ),
    ] = 0


class MergeSettings(Settings, frozen=True):
    """What merge commands take besides."""

    module_weight: Annotated[
        tuple[str, ...],
        _says(
            MERGE,
            "Factor on --weight in the modules that match the glob, such as 'layers.0-7.*=0.5'; "
            "of the N-th adapter, or of all; repeatable, factors multiply, 0 leaves out.",
            metavar="[N:]GLOB=X",
            expected=EXPECTED,
        ),
    ] = ()
    lambda_: Annotated[float, _says(MERGE, "Factor on the merged update.")] = 1.0
    scale: Annotated[
        Factor | ScaleName | None,
        _says(
            MERGE,
            "Length of the result: paper (as published), auto (label-free rule), norm (mean norm "
            "of the inputs), ls (nearest to the weighted sum), size (as published, shorter where "
            "the inputs are long beside what they are added to), or a factor.",
        ),
    ] = None
    calibrate: Annotated[
        CalibrationName | None,
        _says(
            MERGE,
            "Hold back what the adapters share: before the merge, directions of output that many "
            "write to (pico, for which --scale is auto unless it is given); after it, singular "
            "values that add up the same thing (svc).",
        ),
    ] = None
    missing: Annotated[
        Literal["zero", "skip", "error"],
        _says(
            MERGE,
            "A module absent from an adapter contributes nothing (zero), is left out of the "
            "result (skip), or stops the merge (error).",
        ),
    ] = "zero"
    extras: Annotated[
        Literal["error", "first", "mean", "drop"],
        _says(
            MERGE,
            "Saved heads, biases, embeddings beside the LoRA: stop (error), take the first "
            "adapter's (first), their mean where every adapter has the same (mean), or leave them "
            "out (drop).",
        ),
    ] = "error"
    base_mismatch: Annotated[
        Literal["warn", "error", "ignore"],
        _says(MERGE, "Adapters that name different base models."),
    ] = "warn"
