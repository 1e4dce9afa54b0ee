"""Adapters of a rank that follow from models, as they are asked for: `bake --rank` and `extract`.

The command line and recipe files end here, as methods do in a `Recipe`.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from msgspec import Meta, Struct

from loramerge.errors import UsageError
from loramerge.options import Count, Options, build
from loramerge.recipe import Named, Recipe, make_recipe
from loramerge.settings import ComputeDtype, SaveDtype

__all__ = ["BakeOptions", "Derivation", "ExtractOptions", "make_baked", "make_extracted"]

BAKE, EXTRACT = "bake", "extract"


def _says(description: str, **extra: Any) -> Meta:
    return Meta(description=description, extra=extra)


class BakeOptions(Options, frozen=True):
    """What bake takes besides the adapter."""

    base: Annotated[
        str | None,
        _says(
            "Directory of the base model or its whole pipeline, or one safetensors file.",
            metavar="MODEL",
        ),
    ] = None
    rank: Annotated[
        Count | None,
        _says("Write a plain LoRA of this rank instead of full weights.", short="-r"),
    ] = None
    save_dtype: SaveDtype = "auto"
    compute_dtype: ComputeDtype = "float32"


class ExtractOptions(Options, frozen=True):
    """What extract takes; of the two models the second is the first after it was tuned."""

    base: Annotated[
        str | None, _says("The model before it was tuned, as for bake.", metavar="MODEL")
    ] = None
    tuned: Annotated[str | None, _says("The model after it was tuned.", metavar="MODEL")] = None
    rank: Annotated[Count | None, _says("Rank of the adapter.", short="-r")] = None
    save_dtype: SaveDtype = "auto"
    compute_dtype: ComputeDtype = "float32"


class Derivation(Struct, frozen=True):
    """A checked derivation: the models, and how their adapter is squeezed.

    `tuned` is none where the adapter given is baked into the base.
    """

    name: str
    adapters: tuple[Named, ...]
    base: str
    tuned: str | None
    squeeze: Recipe


def make_baked(adapters: Sequence[Named], values: Mapping[str, object]) -> Derivation:
    """Check flat values of bake. Raises UsageError that names the option and the bad value."""
    options = build(BakeOptions, values, BAKE)
    if len(adapters) != 1:
        raise UsageError(f"bake takes one adapter, not {len(adapters)}.", "name one")
    if options.base is None:
        raise UsageError("bake needs to know the base model: --base MODEL.", "name a directory")
    if options.rank is None:
        raise UsageError(
            "bake without --rank writes a model, and the steps of a recipe make adapters.",
            "add --rank 16, or type bake without a recipe",
        )
    name = adapters[0].reference
    return Derivation(BAKE, tuple(adapters), options.base, None, _squeezed(name, options))


def make_extracted(adapters: Sequence[Named], values: Mapping[str, object]) -> Derivation:
    """Check flat values of extract. Raises UsageError that names the option and the bad value."""
    options = build(ExtractOptions, values, EXTRACT)
    if adapters:
        raise UsageError("extract takes no adapters, but base and tuned: two models.", "name them")
    if options.base is None or options.tuned is None or options.rank is None:
        raise UsageError(
            "extract needs base and tuned, two models, and a rank.",
            "for example: loramerge extract my-model my-tuned-model --rank 32",
        )
    squeeze = _squeezed(options.tuned, options)
    return Derivation(EXTRACT, (), options.base, options.tuned, squeeze)


def _squeezed(reference: str, options: BakeOptions | ExtractOptions) -> Recipe:
    values = {
        "rank": options.rank,
        "save_dtype": options.save_dtype,
        "compute_dtype": options.compute_dtype,
    }
    return make_recipe("squeeze", [Named(reference)], values)
