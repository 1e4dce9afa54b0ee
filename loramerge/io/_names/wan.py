"""Wan 2.1 and 2.2 video, with or without an image, and VACE."""

from loramerge.io._names._components import denoiser
from loramerge.io._names._table import Family, rows

BLOCK = "blocks.{}."
LAYERS = {
    f"{name}.{layer}": f"{part}.{path}"
    for name, part in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for layer, path in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
} | {
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
TABLE = (
    *rows(LAYERS, BLOCK),
    *rows(LAYERS | {"before_proj": "proj_in", "after_proj": "proj_out"}, "vace_blocks.{}."),
    *rows(
        {
            "patch_embedding": "patch_embedding",
            "time_embedding.0": "condition_embedder.time_embedder.linear_1",
            "time_embedding.2": "condition_embedder.time_embedder.linear_2",
            "time_projection.1": "condition_embedder.time_proj",
            "text_embedding.0": "condition_embedder.text_embedder.linear_1",
            "text_embedding.2": "condition_embedder.text_embedder.linear_2",
            "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
            "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
            "head.head": "proj_out",
        }
    ),
)

# Wan 2.2 has a second model for low noise, which other programs keep in a file of its own.
FAMILIES = (
    Family("Wan", "wan", (denoiser(TABLE),), {BLOCK: (30, 40)}),
    Family(
        "Wan 2.2 for low noise",
        "wan22",
        (denoiser(TABLE, "transformer_2"),),
        {BLOCK: (30, 40)},
        leaves_only=True,
    ),
)
