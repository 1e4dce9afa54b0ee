"""Qwen-Image: diffusers' names are the original ones."""

from loramerge.io._names._components import denoiser
from loramerge.io._names._table import Family, Row

BLOCK = "transformer_blocks.{}."
STREAMS = tuple(
    f"{BLOCK}{stream}_{layer}"
    for stream in ("img", "txt")
    for layer in ("mod.1", "mlp.net.0.proj", "mlp.net.2")
)
PATHS = (
    *(f"{BLOCK}attn.to_{name}" for name in ("q", "k", "v", "out.0", "add_out")),
    *(f"{BLOCK}attn.add_{letter}_proj" for letter in "qkv"),
    *STREAMS,
    "img_in",
    "txt_in",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    "norm_out.linear",
    "proj_out",
)

FAMILIES = (
    Family(
        "Qwen-Image",
        "qwenimage",
        (denoiser([Row(path, (path,)) for path in PATHS]),),
        {BLOCK: (60,)},
    ),
)
