"""What a step of a recipe may be: a method or a preset, or a command that is none of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from msgspec import Struct

from loramerge.derivation import (
    BakeOptions,
    Derivation,
    ExtractOptions,
    make_baked,
    make_extracted,
)
from loramerge.options import Option, Options, describe
from loramerge.recipe import Named, Recipe, find, options_of
from loramerge.translation import CONVERT, ConvertOptions, Translation, make_translation

__all__ = ["KINDS", "Asked", "Kind", "step_options"]

Asked: TypeAlias = Recipe | Translation | Derivation


class Kind(Struct, frozen=True):
    """A command that is no method: what it takes, and how it is checked.

    `needs` are the keys that a step must have.
    """

    summary: str
    options: type[Options]
    needs: tuple[str, ...]
    make: Callable[[Sequence[Named], Mapping[str, object]], Translation | Derivation]


KINDS: Mapping[str, Kind] = {
    CONVERT: Kind(
        "Write the adapter in another layout: factors bit for bit, names translated.",
        ConvertOptions,
        ("adapters", "to"),
        make_translation,
    ),
    "bake": Kind(
        "Make plain LoRA of DoRA: the best of a rank for what it makes of its base model.",
        BakeOptions,
        ("adapters", "base", "rank"),
        make_baked,
    ),
    "extract": Kind(
        "Make an adapter of the difference between two full models.",
        ExtractOptions,
        ("base", "tuned", "rank"),
        make_extracted,
    ),
}


def step_options(method: str) -> list[Option]:
    """What a step may hold besides its name and adapters. Raises UsageError for no method."""
    kind = KINDS.get(method)
    return options_of(find(method)[0]) if kind is None else describe(kind.options)
