"""Stable Diffusion 1, 2 and XL: one UNet, whose blocks the original numbers one after the other."""

from collections.abc import Iterator

from loramerge.io._names._components import clip, denoiser
from loramerge.io._names._table import Family, Row, rows

ATTENTION = (
    "proj_in",
    "proj_out",
    *(
        f"transformer_blocks.{{}}.{path}"
        for path in (
            *(
                f"{attn}.to_{name}"
                for attn in ("attn1", "attn2")
                for name in ("q", "k", "v", "out.0")
            ),
            "ff.net.0.proj",
            "ff.net.2",
        )
    ),
)
RESNET = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
MIDDLE = {"0.": "resnets.0.", "1.": "attentions.0.", "2.": "resnets.1."}
# A level has so many resnets on its way down, and one more on its way up.
RESNETS = 2


def unet(levels: int, attention: tuple[int, ...]) -> Iterator[Row]:
    """The rows of a UNet with so many levels, of which some have attention."""
    for level in range(levels):
        for layer in range(RESNETS):
            number = 1 + level * (RESNETS + 1) + layer
            names = (f"input_blocks.{number}.", f"down_blocks.{level}.", layer)
            yield from _layer(*names, level in attention)
        if level < levels - 1:
            number = (level + 1) * (RESNETS + 1)
            yield Row(f"input_blocks.{number}.0.op", (f"down_blocks.{level}.downsamplers.0.conv",))
    for old, new in MIDDLE.items():
        leaves = {name: name for name in ATTENTION} if "attentions" in new else RESNET
        yield from rows(leaves, f"middle_block.{old}", f"mid_block.{new}")
    for level in range(levels):
        attended = levels - 1 - level in attention
        for layer in range(RESNETS + 1):
            number = level * (RESNETS + 1) + layer
            yield from _layer(f"output_blocks.{number}.", f"up_blocks.{level}.", layer, attended)
        if level < levels - 1:
            place = 2 if attended else 1
            upsampler = f"output_blocks.{number}.{place}.conv"
            yield Row(upsampler, (f"up_blocks.{level}.upsamplers.0.conv",))
    yield from rows(
        {
            "input_blocks.0.0": "conv_in",
            "out.2": "conv_out",
            "time_embed.0": "time_embedding.linear_1",
            "time_embed.2": "time_embedding.linear_2",
            "label_emb.0.0": "add_embedding.linear_1",
            "label_emb.0.2": "add_embedding.linear_2",
        }
    )


def _layer(old: str, new: str, layer: int, attended: bool) -> Iterator[Row]:
    """A resnet and the attention that may follow it."""
    yield from rows(RESNET, f"{old}0.", f"{new}resnets.{layer}.")
    if attended:
        names = {name: name for name in ATTENTION}
        yield from rows(names, f"{old}1.", f"{new}attentions.{layer}.")


# sd-scripts trains diffusers' UNet of versions 1 and 2, and the original one of XL.
FAMILIES = (
    Family(
        "Stable Diffusion 1 or 2",
        "stablediffusionv?[12]|sdv?[12]",
        (
            denoiser(unet(4, (0, 1, 2)), "unet", kohya_as_diffusers=True),
            clip("text_encoder", "lora_te_"),
        ),
    ),
    Family(
        "Stable Diffusion XL",
        "stablediffusionxl|sdxl",
        (
            denoiser(unet(3, (1, 2)), "unet"),
            clip("text_encoder"),
            clip("text_encoder_2", "lora_te2_", "clip_g"),
        ),
    ),
)
