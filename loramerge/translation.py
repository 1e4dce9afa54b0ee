"""A conversion as it is asked for: of which adapter, into which layout, with what it must know.

The command line and recipe files end here, as methods do in a `Recipe`.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from loramerge.errors import UsageError
from loramerge.options import OptionError, Options, build, did_you_mean
from loramerge.recipe import Named
from loramerge.registry import layout_names

__all__ = [
    "CONVERT",
    "ConvertOptions",
    "Translation",
    "heads_text",
    "make_translation",
]

# The command, the step of a recipe, and what a conversion is recorded as.
CONVERT = "convert"
EXAMPLE = "for example: loramerge convert my-adapter --to mlx"


def _says(description: str, **extra: Any) -> Meta:
    return Meta(description=description, extra=extra)


class ConvertOptions(Options, frozen=True):
    """What a conversion takes besides the adapter; only `to` must be given."""

    to: Annotated[
        str | None,
        _says(
            "The layout to write: peft, kohya, diffusers, comfy, mlx, ... (loramerge layouts).",
            metavar="LAYOUT",
            expected="the name of a layout",
        ),
    ] = None
    initial: Annotated[
        str | None,
        _says(
            "The adapter before it was trained, where its start changed the base (PiSSA).",
            metavar="ADAPTER",
        ),
    ] = None
    base: Annotated[
        str | None,
        _says(
            "Its base model instead, where that says what it started from (PiSSA, OLoRA).",
            metavar="MODEL",
        ),
    ] = None
    pruned: Annotated[
        tuple[str, ...],
        _says(
            "Index files of the pruning its base had gone through (LoRAM); repeatable.",
            metavar="DIR",
        ),
    ] = ()
    shared: Annotated[
        str | None,
        _says(
            "Where factors are that the adapter leaves out: frozen or shared ones.",
            metavar="ADAPTER",
        ),
    ] = None
    projections: Annotated[
        Literal["split", "fused", "experts"] | None,
        _says(
            "q, k, v and gate, up of a language model by themselves, or as the qkv_proj and "
            "gate_up_proj that Phi-3 and Phi-4 have (GLM-4 the latter alone; Llama, Mistral, Qwen "
            "and Gemma neither); experts as modules, or parameters. experts: only these as "
            "parameters, as transformers 5 has them.  [default: as they are]"
        ),
    ] = None
    rename: Annotated[
        tuple[str, ...],
        _says(
            "Another prefix for the names of modules, as versions of a model's code have it; "
            "repeatable.",
            metavar="OLD=NEW",
        ),
    ] = ()
    heads: Annotated[
        str | None,
        _says(
            "Heads of queries and of keys, where shapes do not tell: torchtune, qkv_proj.",
            metavar="N,N",
            expected="two numbers such as 32,8",
        ),
    ] = None
    alphas: Annotated[
        Literal["fold", "keep"],
        _says(
            "Where alphas of modules differ and PEFT is written: fold them into B, or keep them, "
            "bit for bit, in an alpha_pattern, which PEFT and transformers alone read."
        ),
    ] = "fold"
    extras: Annotated[
        Literal["error", "drop"], _says("What happens to tensors that the layout cannot hold.")
    ] = "error"


class Translation(Struct, frozen=True):
    """A checked conversion; of two adapters the second is what the first started from."""

    adapters: tuple[Named, ...]
    options: ConvertOptions
    to: str
    heads: tuple[int, int] | None = None
    renames: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """What errors call it."""
        return CONVERT


def make_translation(adapters: Sequence[Named], values: Mapping[str, object]) -> Translation:
    """Check flat values. What the adapter started from is read as the adapter is.

    Raises UsageError that names the option and the bad value.
    """
    options = build(ConvertOptions, values, CONVERT)
    if options.to is None:
        raise UsageError("convert needs to know the layout to write: --to LAYOUT.", EXAMPLE)
    if options.to not in layout_names():
        close = did_you_mean(options.to, layout_names())
        raise OptionError(
            f"There is no layout '{options.to}'.",
            f"did you mean '{close}'?" if close else f"one of: {', '.join(layout_names())}",
            "to",
            f"is '{options.to}', no layout",
        )
    if len(adapters) != 1:
        raise UsageError(f"convert takes one adapter, not {len(adapters)}.", EXAMPLE)
    given = [replace(adapters[0], shared=options.shared)]
    if options.initial is not None:
        given.append(replace(given[0], reference=options.initial))
    heads = None if options.heads is None else _heads(options.heads)
    return Translation(tuple(given), options, options.to, heads, tuple(map(_pair, options.rename)))


def heads_text(heads: Sequence[int]) -> str:
    """Heads as they are typed: 32,8."""
    return ",".join(map(str, heads))


def _heads(text: str) -> tuple[int, int]:
    """32,8: heads of queries, heads of keys and values; one number where they are as many."""
    try:
        queries, keys = map(int, text.split(",")) if "," in text else (int(text), int(text))
    except ValueError:
        queries = keys = 0
    if keys < 1 or queries < 1 or queries % keys:
        raise OptionError(
            f"--heads {text} is no number of heads.",
            "heads of queries, then of keys, as in config.json of the model: --heads 32,8",
            "heads",
            f"is '{text}', no number of heads",
        )
    return queries, keys


def _pair(text: str) -> tuple[str, str]:
    """OLD=NEW, of which either may be empty."""
    old, equals, new = text.partition("=")
    if not equals:
        raise OptionError(
            f"--rename {text} does not say what takes its place.",
            f"for example: --rename '{text}=model.'",
            "rename",
            f"holds '{text}', which does not say what takes its place",
        )
    return old, new
