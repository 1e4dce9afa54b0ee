"""Sparsifiers: which entries of an update an element-wise rule gets to see."""

from collections.abc import Callable, Mapping
from typing import Annotated, Literal, TypeAlias

from msgspec import Meta

from loramerge.adapter import Array
from loramerge.algorithms._spaces import Space, Stack
from loramerge.linalg.kernels import double, like, namespace
from loramerge.linalg.masks import uniform
from loramerge.linalg.select import Largest, largest
from loramerge.options import Options, describe

__all__ = ["SpaceOptions", "SparseOptions", "Thin", "has_every_rank", "share", "sparsifier"]

Sparsify: TypeAlias = Literal["none", "magnitude", "dare", "della", "breadcrumbs"]
# A pure function of one tile [*b, rows, q] and the row it starts at.
Thin: TypeAlias = Callable[[Array, int], Array]

# A share of a count that is whole but for rounding is not rounded up.
ROUNDING = 1e-12
# Less than half a rounding of float32, even times a row's length.
TIE = 2.0**-42
# Which sparsifiers an option is for, and the value that is true of the others as well.
USED_BY: Mapping[str, tuple[Sparsify, ...]] = {
    "density": ("magnitude", "dare", "della", "breadcrumbs"),
    "epsilon": ("della",),
    "gamma": ("breadcrumbs",),
}
NEUTRAL = {"density": 1.0, "gamma": 0.0}


class SpaceOptions(Options, frozen=True):
    """The coordinates an element-wise rule works in."""

    space: Annotated[
        Space,
        Meta(
            description="Coordinates in which entries are looked at: common axes of all updates "
            "on the output side (knots) or on both (core), or the delta weights as they are "
            "(dense; slower by far)."
        ),
    ] = "knots"


class SparseOptions(SpaceOptions, frozen=True):
    """What an element-wise rule sees: which entries, in which coordinates."""

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


def has_every_rank(options: SpaceOptions) -> bool:
    """Whether the result may have more ranks than the updates together."""
    return options.space == "dense"


def sparsifier(stack: Stack, position: int, options: SparseOptions) -> Thin:
    """The sparsifier of one adapter: what it must know of the whole is found out here, once."""
    make = {
        "none": _none,
        "magnitude": _magnitude,
        "dare": _dare,
        "della": _della,
        "breadcrumbs": _breadcrumbs,
    }
    return make[options.sparsify](stack, position, options)


def _none(stack: Stack, position: int, options: SparseOptions) -> Thin:
    return lambda values, row: values


def _magnitude(stack: Stack, position: int, options: SparseOptions) -> Thin:
    """Keep the largest entries of the matrix: exactly ceil(density * entries) of them."""
    kept = _largest(stack, position, share(options.density, stack))

    def thin(values: Array, row: int) -> Array:
        return _kept(kept.chosen(abs(values), row), values)

    return thin


def _dare(stack: Stack, position: int, options: SparseOptions) -> Thin:
    """Keep each entry with chance `density`, divided by it (arXiv:2311.03099)."""

    def thin(values: Array, row: int) -> Array:
        return _kept(_draw(stack, position, values, row) < options.density, values) * (
            1 / options.density
        )

    return thin


def _della(stack: Stack, position: int, options: SparseOptions) -> Thin:
    """Keep an entry with a chance that grows with its rank in its row, divided by that chance.

    p = density - epsilon + 2 epsilon (rank - 1) / (n - 1) (MagPrune, arXiv:2406.11617). Where
    density leaves less room to 0 or 1 than epsilon, epsilon is that room.
    """
    density = options.density
    epsilon = min(options.epsilon, density, 1 - density)

    def thin(values: Array, row: int) -> Array:
        # Axes that are none hold zeros, which come first in the order.
        columns = stack.columns[..., None, None]
        rank = namespace(values).clip(_rank(values) - (values.shape[-1] - columns), min=0)
        share = like(rank, values) / like(namespace(columns).clip(columns - 1, min=1), values)
        chance = (density - epsilon) + 2 * epsilon * share
        kept = like(_draw(stack, position, values, row) < chance, values)
        found: Array = values * kept / (chance * kept + (1 - kept))
        return found

    return thin


def _rank(values: Array) -> Array:
    """The rank of each magnitude in its row, 0 for the smallest; of equal ones the first is first.

    Half the time of a stable sort: float32 magnitudes leave float64 room for the index.
    """
    xp = namespace(values)
    index = xp.arange(values.shape[-1], dtype=xp.float64, device=values.device)
    order = xp.argsort(double(abs(values)) * (1 + index * TIE), axis=-1, stable=False)
    rank: Array = xp.argsort(order, axis=-1, stable=False)
    return rank


def _breadcrumbs(stack: Stack, position: int, options: SparseOptions) -> Thin:
    """Drop the largest gamma and so many of the smallest that density is kept (arXiv:2312.06795).

    Where gamma and density exceed the whole, less than gamma is dropped.
    """
    xp = namespace(stack.rows)
    entries = stack.rows * stack.columns
    count = share(options.density, stack)
    dropped = xp.astype(xp.floor(double(entries) * options.gamma), xp.int64)
    dropped = xp.minimum(dropped, entries - count)
    kept = _largest(stack, position, dropped + count)
    outliers = _largest(stack, position, dropped) if bool(xp.any(dropped > 0)) else None

    def thin(values: Array, row: int) -> Array:
        magnitudes = abs(values)
        chosen = kept.chosen(magnitudes, row)
        if outliers is not None:
            chosen = chosen & ~outliers.chosen(magnitudes, row)
        return _kept(chosen, values)

    return thin


def _kept(kept: Array, values: Array) -> Array:
    found: Array = values * like(kept, values)
    return found


def _draw(stack: Stack, position: int, values: Array, row: int) -> Array:
    return uniform(stack.keys[position], (row, 0), values.shape[-2:], values)


def share(density: float, stack: Stack) -> Array:
    """ceil(density n) of the n entries that count, in each item of the batch. int64 [*b]"""
    xp = namespace(stack.rows)
    wanted = xp.ceil(double(stack.rows * stack.columns) * (density * (1 - ROUNDING)))
    count: Array = xp.astype(wanted, xp.int64)
    return count


def _largest(stack: Stack, position: int, count: Array) -> Largest:
    def magnitudes(rows: slice) -> Array:
        return abs(stack.tile(position, rows))

    return largest(magnitudes, list(stack.tiles()), count, abs(stack.sample(position)))
