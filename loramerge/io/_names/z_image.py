"""Z-Image: layers with one fused attention in the original, and two refiners before them."""

from loramerge.io._names._components import denoiser
from loramerge.io._names._table import Family, Row, rows

STACKS = ("layers.{}.", "noise_refiner.{}.", "context_refiner.{}.")
OWN = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
TABLE = (
    *(
        Row(
            f"{stack}attention.qkv",
            tuple(f"{stack}attention.to_{letter}" for letter in "qkv"),
            (1, 1, 1),
        )
        for stack in STACKS
    ),
    *(
        row
        for stack in STACKS
        for row in rows({"attention.out": "attention.to_out.0"} | {n: n for n in OWN}, stack)
    ),
    *(Row(path, (path,)) for path in (f"{stack}adaLN_modulation.0" for stack in STACKS[:2])),
    *rows({name: name for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1")}),
    *rows(
        {
            "x_embedder": "all_x_embedder.2-1",
            "final_layer.linear": "all_final_layer.2-1.linear",
            "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
        }
    ),
)

# musubi-tuner trains a model with diffusers' names.
FAMILIES = (
    Family("Z-Image", "zimage", (denoiser(TABLE, kohya_as_diffusers=True),), {"layers.{}.": (30,)}),
)
