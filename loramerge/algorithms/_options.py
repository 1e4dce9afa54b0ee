"""The options of methods that look at entries."""

from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

from msgspec import Meta

from loramerge.algorithms._spaces import Space
from loramerge.options import Options, describe

__all__ = ["SpaceOptions", "SparseOptions", "Sparsify", "ThinningOptions", "has_every_rank"]

Sparsify: TypeAlias = Literal["none", "magnitude", "dare", "della", "breadcrumbs"]
# Which sparsifiers an option is for, and the value that is true of the others as well.
USED_BY: Mapping[str, tuple[Sparsify, ...]] = {
    "density": ("magnitude", "dare", "della", "breadcrumbs"),
    "trim_scope": ("magnitude", "breadcrumbs"),
    "epsilon": ("della",),
    "gamma": ("breadcrumbs",),
}
NEUTRAL = {"density": 1.0, "gamma": 0.0}


SpaceChoice: TypeAlias = Annotated[
    Space,
    Meta(
        description="Coordinates in which entries are looked at: common axes of all updates "
        "on the output side (knots) or on both (core), or the delta weights as they are "
        "(dense; slower by far)."
    ),
]


class SpaceOptions(Options, frozen=True):
    """The coordinates an element-wise rule works in."""

    space: SpaceChoice = "knots"


class ThinningOptions(Options, frozen=True):
    """Which entries of each update an element-wise rule sees."""

    sparsify: Annotated[
        Sparsify,
        Meta(
            description="Which entries of each update take part: all (none), the largest "
            "(magnitude), random ones (dare), random ones by size (della), all but the largest and "
            "the smallest (breadcrumbs)."
        ),
    ] = "none"
    density: Annotated[
        float, Meta(gt=0, le=1, description="Share of the entries each update keeps.")
    ] = 0.2
    epsilon: Annotated[
        float,
        Meta(
            gt=0,
            lt=1,
            description="della: the chance to be kept runs from density - epsilon for the "
            "smallest entry of a row to density + epsilon for the largest.",
        ),
    ] = 0.1
    gamma: Annotated[
        float,
        Meta(ge=0, lt=1, description="breadcrumbs: share of the largest entries that is dropped."),
    ] = 0.01

    def __post_init__(self) -> None:
        """Raise ValueError for a value that would do nothing, though it looks as if it did."""
        for option in describe(type(self)):
            used = self.sparsify in USED_BY.get(option.name, (self.sparsify,))
            value = getattr(self, option.name)
            if not used and value not in (option.default, NEUTRAL.get(option.name)):
                raise ValueError(f"{option.flag} needs --sparsify {USED_BY[option.name][0]}")


class SparseOptions(ThinningOptions, frozen=True):
    """The same, in the coordinates of a space, and counted over a module or the whole model."""

    space: SpaceChoice = "knots"
    trim_scope: Annotated[
        Literal["tensor", "model"],
        Meta(
            description="Of what magnitude and breadcrumbs take their share: of each module's "
            "entries (tensor), or of all entries of an adapter (model, the papers'; it takes two "
            "passes more)."
        ),
    ] = "tensor"


def has_every_rank(options: SpaceOptions | SparseOptions) -> bool:
    """Whether the result may have more ranks than the updates together."""
    return options.space == "dense"
