"""Layouts that are recognised by their keys but not read yet: named, never guessed at."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Foreign", "recognise"]


@dataclass(frozen=True, slots=True)
class Foreign:
    """A layout by the keys that give it away, and what a user can do with it today."""

    name: str
    pattern: re.Pattern[str]
    hint: str


def _foreign(name: str, pattern: str, hint: str) -> Foreign:
    return Foreign(name, re.compile(pattern), hint)


LYCORIS_HINT = "train or export it as plain LoRA (LoCon without Tucker decomposition)"
DIFFUSERS_HINT = "save it in kohya's layout with diffusers' convert_state_dict_to_kohya"

FOREIGN = (
    _foreign(
        "cloneofsimo",
        r"(unet|text_encoder):\d+:(up|down)",
        "re-train it with a tool that stores module names",
    ),
    _foreign("SAM-LoRA", r"w_[ab]_\d+", "it names no modules; only its own loader can read it"),
    _foreign(
        "torchtune",
        r".+\.lora_[ab]\.weight",
        "export it from torchtune with adapter_only in PEFT layout",
    ),
    _foreign("MLX", r".+\.lora_[ab]", "fuse or convert it with mlx-lm before merging"),
    _foreign(
        "Megatron/NeMo",
        r".+\.adapter\.linear_(in|out)\.weight",
        "export it to Hugging Face PEFT from NeMo",
    ),
    _foreign("LyCORIS LoHa", r".+\.hada_.+", LYCORIS_HINT),
    _foreign("LyCORIS LoKr", r".+\.lokr_.+", LYCORIS_HINT),
    _foreign("LyCORIS LoCon with Tucker decomposition", r".+\.lora_mid\.weight", LYCORIS_HINT),
    _foreign(
        "LyCORIS full difference",
        r".+\.(diff|diff_b|w_norm|b_norm|oft_blocks|oft_diag)",
        LYCORIS_HINT,
    ),
    _foreign("XLabs Flux", r".*processor\.(qkv|proj)_lora\d?\..+", DIFFUSERS_HINT),
    _foreign(
        "SoRA", r".+\.lora\.(lora_[AB]|gate)", "fold its gates into lora_B and save it with PEFT"
    ),
    _foreign("AdaLoRA", r".+\.lora_E(\.[^.]+)?", "save it as plain LoRA: fold lora_E into lora_A"),
    _foreign("LoHa (PEFT)", r".+\.hada_w.+", LYCORIS_HINT),
    _foreign("VeRA", r".+\.vera_lambda_[bd](\..+)?", "merge it into the base model with PEFT"),
    _foreign("VB-LoRA", r".+\.vblora_.+", "merge it into the base model with PEFT"),
    _foreign("IA3", r".+\.ia3_l(\..+)?", "it scales activations and has no low-rank form"),
    _foreign(
        "OFT or BOFT", r".+\.(oft|boft)_[rsR](\..+)?", "it rotates weights and has no low-rank form"
    ),
    _foreign("ComfyUI (diffusion_model.)", r"diffusion_model\..+\.lora_.+", DIFFUSERS_HINT),
    _foreign(
        "diffusers",
        r"(unet|transformer|transformer_2|text_encoder(_\d)?|prior)\..+\.(lora_[AB]\.weight|lora\.(up|down)\.weight|lora_linear_layer\..+)"
        r"|.+(processor\.to_\w+_lora|\.lora)\.(up|down)\.weight",
        DIFFUSERS_HINT,
    ),
)


def recognise(keys: Iterable[str]) -> Foreign | None:
    """The first foreign layout one of the keys gives away."""
    found = list(keys)
    for foreign in FOREIGN:
        if any(foreign.pattern.fullmatch(key) for key in found):
            return foreign
    return None
