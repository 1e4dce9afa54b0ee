"""Flux.1 of Black Forest Labs (double and single blocks) and its successor Flux.2."""

from loramerge.io._names._components import clip, denoiser, t5
from loramerge.io._names._table import Family, Row, rows

QKV = (1, 1, 1)
DOUBLE, BLOCK = "double_blocks.{}.", "transformer_blocks.{}."
SINGLE, SINGLE_BLOCK = "single_blocks.{}.", "single_transformer_blocks.{}."
IMAGE = tuple(f"{BLOCK}attn.to_{letter}" for letter in "qkv")
TEXT = tuple(f"{BLOCK}attn.add_{letter}_proj" for letter in "qkv")
SINGLE_QKV = tuple(f"{SINGLE_BLOCK}attn.to_{letter}" for letter in "qkv")
ATTENTION = (
    Row(f"{DOUBLE}img_attn.qkv", IMAGE, QKV),
    Row(f"{DOUBLE}txt_attn.qkv", TEXT, QKV),
    *rows({"img_attn.proj": "attn.to_out.0", "txt_attn.proj": "attn.to_add_out"}, DOUBLE, BLOCK),
)
ENDS = (
    *rows({"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}),
    Row("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True),
)


def embedders(target: str, **names: str) -> tuple[Row, ...]:
    """The two layers of each embedder of a scalar or vector."""
    return rows(
        {
            f"{name}.{layer}_layer": f"{target}.{part}.linear_{number}"
            for name, part in names.items()
            for number, layer in ((1, "in"), (2, "out"))
        }
    )


FLUX = (
    *ATTENTION,
    *rows(
        {
            "img_mlp.2": "ff.net.2",
            "img_mod.lin": "norm1.linear",
            "txt_mlp.2": "ff_context.net.2",
            "txt_mod.lin": "norm1_context.linear",
        },
        DOUBLE,
        BLOCK,
    ),
    Row(f"{DOUBLE}img_mlp.0", (f"{BLOCK}ff.net.0.proj",), (4,)),
    Row(f"{DOUBLE}txt_mlp.0", (f"{BLOCK}ff_context.net.0.proj",), (4,)),
    Row(f"{SINGLE}linear1", (*SINGLE_QKV, f"{SINGLE_BLOCK}proj_mlp"), (*QKV, 4)),
    *rows({"linear2": "proj_out", "modulation.lin": "norm.linear"}, SINGLE, SINGLE_BLOCK),
    *embedders(
        "time_text_embed",
        time_in="timestep_embedder",
        guidance_in="guidance_embedder",
        vector_in="text_embedder",
    ),
    *ENDS,
)
# x-flux adapts the attention of each block by a processor: 1 is the image's, 2 the text's. In
# single blocks qkv has no part in the MLP, and proj is the whole of linear2.
XLABS = (
    Row(f"{DOUBLE}processor.qkv_lora1", IMAGE, QKV),
    Row(f"{DOUBLE}processor.qkv_lora2", TEXT, QKV),
    Row(f"{DOUBLE}processor.proj_lora1", (f"{BLOCK}attn.to_out.0",)),
    Row(f"{DOUBLE}processor.proj_lora2", (f"{BLOCK}attn.to_add_out",)),
    Row(f"{SINGLE}processor.qkv_lora", SINGLE_QKV, QKV),
    Row(f"{SINGLE}processor.proj_lora", (f"{SINGLE_BLOCK}proj_out",)),
)
# The MLP is gated, modulation is one layer for all blocks, and linear1 stays whole in diffusers.
FLUX_2 = (
    *ATTENTION,
    Row(f"{DOUBLE}img_mlp.0", (f"{BLOCK}ff.linear_in",), (6,)),
    Row(f"{DOUBLE}txt_mlp.0", (f"{BLOCK}ff_context.linear_in",), (6,)),
    *rows({"img_mlp.2": "ff.linear_out", "txt_mlp.2": "ff_context.linear_out"}, DOUBLE, BLOCK),
    Row(f"{SINGLE}linear1", (f"{SINGLE_BLOCK}attn.to_qkv_mlp_proj",), (9,)),
    Row(f"{SINGLE}linear2", (f"{SINGLE_BLOCK}attn.to_out",)),
    *rows(
        {
            f"{name}.lin": f"{name}.linear"
            for name in (
                "double_stream_modulation_img",
                "double_stream_modulation_txt",
                "single_stream_modulation",
            )
        }
    ),
    *embedders("time_guidance_embed", time_in="timestep_embedder", guidance_in="guidance_embedder"),
    *ENDS,
)

FAMILIES = (
    Family(
        "Flux",
        "flux(?!2)",
        (
            denoiser(FLUX, xlabs=XLABS),
            clip("text_encoder"),
            t5("text_encoder_2", "lora_te3_", "lora_te2_"),
        ),
        {BLOCK: (19,), SINGLE_BLOCK: (38,)},
    ),
    Family("Flux.2", "flux2", (denoiser(FLUX_2),), {BLOCK: (5, 8), SINGLE_BLOCK: (20, 24, 48)}),
)
