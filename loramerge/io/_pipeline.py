"""What files of diffusion pipelines share: the first part of a key, and facts of their headers."""

import re
import struct
from collections.abc import Iterable, Mapping, Sequence

from loramerge.adapter import Adapter, Extra, Module
from loramerge.errors import UsageError
from loramerge.io._grammar import dora, factor_shapes
from loramerge.io._layout import Draft, Given, Stored, alpha_of
from loramerge.io._source import Source

__all__ = [
    "BUNDLED",
    "COMPONENT",
    "ORIGINAL",
    "PREFIXED",
    "agreed",
    "alphas",
    "bundled",
    "carried",
    "described",
    "own_scale",
    "pairs",
]

# Diffusers' names of models. Language models also have a `transformer`: with h, blocks.N.attn.Wqkv
# and the like in it.
COMPONENT = (
    r"(?:unet|prior|text_encoder(?:_\d)?|transformer(?:_\d)?"
    r"(?!\.(?:h|encoder|wte|wpe|word_embeddings|blocks\.\d+\.(?:attn|ffn(?!\.net)))\.))\."
)
# Paths of the original implementation below those, and names of OneTrainer's own.
ORIGINAL = (
    r"(?:(?:unet|transformer)\.(?=(?:double|single|joint|input|output)_blocks\.|middle_block\.)"
    r"|(?:clip_l|clip_g|t5)\.)"
)
# What tells such keys from those of a single model.
PREFIXED = re.compile(rf"{COMPONENT}|{ORIGINAL}|(?:diffusion_model|text_encoders)\.")
# OneTrainer puts the embeddings it trained beside the pairs.
BUNDLED = "bundle_emb."
# The families of metadata that trainers write: of the training, and of the model (modelspec).
FAMILIES = ("ss_", "modelspec.")
# What they say of the file alone that the result is not.
STALE = (
    "modelspec.date",
    "modelspec.hash_sha256",
    "modelspec.thumbnail",
    "ss_network_alpha",
    "ss_network_args",
    "ss_network_dim",
    "ss_network_module",
    "ss_output_name",
)
# A directory of somebody's machine, or a token of the Hub.
PRIVATE = re.compile(
    r"""(?:^|[\s"'`=:,;(\[{<>|])(?:~?/[^\s/]|\.{1,2}[/\\]|~\\|[A-Za-z]:[/\\]|\\\\)|file:/|hf_\w{16}"""
)


def agreed(draft: Draft) -> dict[str, str]:
    """What the headers of all sources say of training and model, unless it is stale or private."""
    first, *others = (source.metadata for source in draft.sources)
    return {
        key: text
        for key, text in first.items()
        if key.startswith(FAMILIES)
        and key not in STALE
        and not PRIVATE.search(f"{key} {text}")
        and all(other.get(key) == text for other in others)
    }


def own_scale(given: Given) -> None:
    """Raise UsageError for an --alpha: each module has one in the file, or else scale 1."""
    if given.alpha is not None:
        raise UsageError(
            f"{given.reference} holds an alpha for each module, or has scale 1; --alpha is for "
            "bare PEFT files.",
            "leave --alpha out",
        )


def described(
    given: Given,
    layout: str,
    modules: Mapping[str, Module],
    groups: Mapping[str, Mapping[str, str]],
    *,
    extras: Sequence[Extra] = (),
    silent: int = 0,
) -> Adapter:
    """The adapter of a layout with names of its own; `silent` modules lack the alpha it expects."""
    source = given.source
    count = f"{silent} of {len(modules)} modules"
    note = f"scale 1 where alpha is missing or 0, as in kohya: {count}"
    return Adapter(
        reference=given.reference,
        layout=layout,
        modules=modules,
        source=source,
        naming=layout,
        extras=tuple(extras),
        variants=dora(groups, "dora_scale"),
        metadata=source.metadata,
        base_model=source.metadata.get("ss_base_model_version"),
        assumed=(note,) if silent else (),
    )


def bundled(source: Source) -> tuple[Extra, ...]:
    """The embeddings that were trained beside."""
    return tuple(
        Extra(key, "embedding", info)
        for key, info in source.tensors.items()
        if key.startswith(BUNDLED)
    )


def carried(draft: Draft) -> list[Stored]:
    """The extras of a result, as they were stored."""
    return [
        Stored(extra.key, extra.info.dtype, extra.info.shape, content=draft.content(extra))
        for extra in draft.extras
    ]


def pairs(draft: Draft, a: str, b: str) -> list[Stored]:
    """The factors of every module, under its name and these ends."""
    tensors: list[Stored] = []
    for module in draft.modules:
        A, B = factor_shapes(module)
        tensors.append(Stored(f"{module.name}.{a}", module.dtype, A, (module.name,), "A"))
        tensors.append(Stored(f"{module.name}.{b}", module.dtype, B, (module.name,), "B"))
    return tensors


def alphas(modules: Iterable[Module]) -> list[Stored]:
    """The alpha of each module: float32 as usual, float64 where only that gives its scale."""
    return [_alpha(module) for module in modules]


def _alpha(module: Module) -> Stored:
    alpha = float(alpha_of(module))
    narrow = struct.pack("<f", alpha)
    exact = struct.unpack("<f", narrow)[0] / module.rank == module.scaling
    dtype, content = ("F32", narrow) if exact else ("F64", struct.pack("<d", alpha))
    return Stored(f"{module.name}.alpha", dtype, (), content=lambda: content)
