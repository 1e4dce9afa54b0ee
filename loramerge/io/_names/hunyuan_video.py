"""HunyuanVideo: double and single blocks as in Flux, under names of its own."""

from loramerge.io._names._components import denoiser
from loramerge.io._names._table import Family, Row, rows

QKV = (1, 1, 1)
DOUBLE, BLOCK = "double_blocks.{}.", "transformer_blocks.{}."
SINGLE, SINGLE_BLOCK = "single_blocks.{}.", "single_transformer_blocks.{}."
REFINER = "txt_in.individual_token_refiner.blocks.{}."
REFINER_BLOCK = "context_embedder.token_refiner.refiner_blocks.{}."


def qkv(parts: str) -> tuple[str, ...]:
    """The paths of query, key and value."""
    return tuple(parts.replace("*", letter) for letter in "qkv")


TABLE = (
    Row(f"{DOUBLE}img_attn_qkv", qkv(f"{BLOCK}attn.to_*"), QKV),
    Row(f"{DOUBLE}txt_attn_qkv", qkv(f"{BLOCK}attn.add_*_proj"), QKV),
    *rows(
        {
            "img_attn_proj": "attn.to_out.0",
            "img_mlp.fc1": "ff.net.0.proj",
            "img_mlp.fc2": "ff.net.2",
            "img_mod.linear": "norm1.linear",
            "txt_attn_proj": "attn.to_add_out",
            "txt_mlp.fc1": "ff_context.net.0.proj",
            "txt_mlp.fc2": "ff_context.net.2",
            "txt_mod.linear": "norm1_context.linear",
        },
        DOUBLE,
        BLOCK,
    ),
    Row(
        f"{SINGLE}linear1",
        (*qkv(f"{SINGLE_BLOCK}attn.to_*"), f"{SINGLE_BLOCK}proj_mlp"),
        (*QKV, 4),
    ),
    *rows({"linear2": "proj_out", "modulation.linear": "norm.linear"}, SINGLE, SINGLE_BLOCK),
    Row(f"{REFINER}self_attn_qkv", qkv(f"{REFINER_BLOCK}attn.to_*"), QKV),
    *rows(
        {
            "self_attn_proj": "attn.to_out.0",
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
            "adaLN_modulation.1": "norm_out.linear",
        },
        REFINER,
        REFINER_BLOCK,
    ),
    *rows(
        {
            "input_embedder": "proj_in",
            "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
            "c_embedder.linear_1": "time_text_embed.text_embedder.linear_1",
            "c_embedder.linear_2": "time_text_embed.text_embedder.linear_2",
        },
        "txt_in.",
        "context_embedder.",
    ),
    *rows(
        {
            "img_in.proj": "x_embedder.proj",
            "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
            "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
            "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
            "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
            "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
            "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
            "final_layer.linear": "proj_out",
        }
    ),
    Row("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True),
)

FAMILIES = (
    Family("HunyuanVideo", "hunyuanvideo", (denoiser(TABLE),), {BLOCK: (20,), SINGLE_BLOCK: (40,)}),
)
