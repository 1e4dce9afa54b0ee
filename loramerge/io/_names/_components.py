"""What the components of a pipeline are called in every vocabulary: prefixes, and their tables."""

from collections.abc import Iterable, Sequence

from loramerge.io._names._table import Component, Row, Spelling, identical

__all__ = ["clip", "denoiser", "t5"]

LAYER = "text_model.encoder.layers.{}"
CLIP = (
    *(f"{LAYER}.self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
    *(f"{LAYER}.mlp.{name}" for name in ("fc1", "fc2")),
    "text_model.embeddings.token_embedding",
    "text_model.embeddings.position_embedding",
    "text_projection",
)
T5 = (
    *(f"encoder.block.{{}}.layer.0.SelfAttention.{name}" for name in "qkvo"),
    *(f"encoder.block.{{}}.layer.1.DenseReluDense.{name}" for name in ("wi", "wi_0", "wi_1", "wo")),
)


def denoiser(
    table: Iterable[Row],
    name: str = "transformer",
    *,
    kohya_as_diffusers: bool = False,
    xlabs: Iterable[Row] = (),
) -> Component:
    """A unet or transformer: the original implementation's names, and diffusers'.

    Files of every vocabulary are found with either; kohya's trainers take the original ones but
    where they train diffusers' own model. lora_transformer_ is OneTrainer's, lycoris_
    SimpleTuner's, and OneTrainer's OMI counts the parts of a fused layer.
    """
    original = tuple(table)
    own = identical(original)
    first, second = (own, original) if kohya_as_diffusers else (original, own)
    counted = tuple(
        Row(f"{row.name}.{place}" if len(row.parts) > 1 else row.name, (part,), swapped=row.swapped)
        for row in original
        for place, part in enumerate(row.parts)
    )
    # Two vocabularies that only Flux.1 has.
    flux = {"bfl": (Spelling("", original),), "xlabs": (Spelling("", tuple(xlabs)),)}
    return Component(
        name,
        {
            "diffusers": (Spelling(f"{name}.", own),),
            "model": (Spelling("", own), Spelling("", original)),
            "comfy": (Spelling("diffusion_model.", original), Spelling("diffusion_model.", own)),
            "kohya": (
                Spelling("lora_unet_", first, flat=True),
                Spelling("lora_unet_", second, flat=True),
                Spelling(f"lora_{name}_", own, flat=True),
                Spelling("lycoris_", own, flat=True),
                Spelling("lycoris_", original, flat=True),
            ),
            "onetrainer": (Spelling(f"{name}.", counted), Spelling(f"{name}.", original)),
            **(flux if xlabs else {}),
        },
    )


def clip(name: str, kohya: str = "lora_te1_", comfy: str = "clip_l") -> Component:
    """A text encoder of CLIP. Newer versions of transformers leave `text_model.` out."""
    bare = tuple(Row(path.removeprefix("text_model."), (path,)) for path in CLIP[:-1])
    return _encoder(name, CLIP, (kohya,), comfy, bare)


def t5(name: str, *kohya: str) -> Component:
    """A text encoder of T5."""
    return _encoder(name, T5, kohya, "t5xxl")


def _encoder(
    name: str, paths: Sequence[str], kohya: Sequence[str], comfy: str, more: Sequence[Row] = ()
) -> Component:
    own = tuple(Row(path, (path,)) for path in paths)
    omi = comfy.removesuffix("xxl")
    return Component(
        name,
        {
            "diffusers": (Spelling(f"{name}.", own), Spelling(f"{name}.", tuple(more))),
            "comfy": (Spelling(f"text_encoders.{comfy}.transformer.", own),),
            "kohya": tuple(Spelling(prefix, own, flat=True) for prefix in kohya),
            "onetrainer": (Spelling(f"{omi}.", own),),
        },
    )
