"""Stable Diffusion 3 and 3.5: joint blocks of an image and a text stream."""

from loramerge.io._names._components import clip, denoiser, t5
from loramerge.io._names._table import Family, Row, rows

QKV = (1, 1, 1)
JOINT, BLOCK = "joint_blocks.{}.", "transformer_blocks.{}."
TABLE = (
    *(
        Row(
            f"{JOINT}x_block.{attn}.qkv",
            tuple(f"{BLOCK}{attn}.to_{letter}" for letter in "qkv"),
            QKV,
        )
        for attn in ("attn", "attn2")
    ),
    Row(
        f"{JOINT}context_block.attn.qkv",
        tuple(f"{BLOCK}attn.add_{letter}_proj" for letter in "qkv"),
        QKV,
    ),
    *rows(
        {
            "x_block.attn.proj": "attn.to_out.0",
            "x_block.attn2.proj": "attn2.to_out.0",
            "x_block.mlp.fc1": "ff.net.0.proj",
            "x_block.mlp.fc2": "ff.net.2",
            "x_block.adaLN_modulation.1": "norm1.linear",
            "context_block.attn.proj": "attn.to_add_out",
            "context_block.mlp.fc1": "ff_context.net.0.proj",
            "context_block.mlp.fc2": "ff_context.net.2",
        },
        JOINT,
        BLOCK,
    ),
    # In the last block it has but a shift and a scale, which diffusers stores the other way round.
    Row(
        f"{JOINT}context_block.adaLN_modulation.1", (f"{BLOCK}norm1_context.linear",), swapped=True
    ),
    *rows(
        {
            "x_embedder.proj": "pos_embed.proj",
            "context_embedder": "context_embedder",
            "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
            "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
            "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
            "final_layer.linear": "proj_out",
        }
    ),
    Row("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True),
)

FAMILIES = (
    Family(
        "Stable Diffusion 3",
        "stablediffusionv?3|sd3",
        (
            denoiser(TABLE),
            clip("text_encoder"),
            clip("text_encoder_2", "lora_te2_", "clip_g"),
            t5("text_encoder_3", "lora_te3_"),
        ),
        {BLOCK: (24, 38)},
    ),
)
