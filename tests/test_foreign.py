"""Layouts that are recognised and not read: each named by its keys, with something to do next."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loramerge.errors import AdapterError
from loramerge.io._foreign import FOREIGN, recognise
from loramerge.io._open import layouts, open_adapter

UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
PEFT = "base_model.model.model.layers.0.self_attn.q_proj"
# The fewest keys that give a layout away -> its name.
MINIMAL = {
    "Megatron/NeMo": [
        "decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight",
        "decoder.layers.0.self_attention.linear_qkv.adapter.linear_out.weight",
    ],
    "XLabs Flux": [
        "double_blocks.0.processor.qkv_lora1.down.weight",
        "double_blocks.0.processor.qkv_lora1.up.weight",
    ],
    "BFL control LoRA": [
        "double_blocks.0.img_attn.norm.query_norm.scale",
        "double_blocks.0.img_attn.qkv.lora_A.weight",
        "double_blocks.0.img_attn.qkv.lora_B.weight",
    ],
    "PEFT RandLoRA": [f"{PEFT}.randlora_lambda", "base_model.randlora_A"],
    "PEFT MiSS": [f"{PEFT}.miss_block"],
    "PEFT FourierFT": [f"{PEFT}.fourierft_spectrum"],
    "PEFT HiRA": [f"{PEFT}.hira_A", f"{PEFT}.hira_B"],
    "PEFT HRA": [f"{PEFT}.hra_u"],
    "PEFT SHiRA": [f"{PEFT}.shira_weight", f"{PEFT}.shira_indices"],
    "PEFT IA3": [f"{PEFT}.ia3_l"],
    "PEFT OFT or BOFT": [f"{PEFT}.oft_R.weight"],
    "LyCORIS GLoRA": ["lora_unet_a.a1.weight", "lora_unet_a.b1.weight"],
    "LyCORIS OFT": ["lora_unet_a.oft_blocks"],
    "LyCORIS IA3": ["lora_unet_a.weight", "lora_unet_a.on_input"],
    "ComfyUI (diffusion_model.)": [
        "diffusion_model.blocks.0.self_attn.q.lora_down.weight",
        "diffusion_model.blocks.0.self_attn.q.lora_up.weight",
        "diffusion_model.blocks.0.norm3.diff",
    ],
    "diffusers": [
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight",
    ],
    "loralib": ["transformer.h.0.attn.c_attn.lora_A", "transformer.h.0.attn.c_attn.lora_B"],
}
# Every other spelling diffusers had, oldest first, and components it has today.
DIFFUSERS = [
    f"{UNET}.processor.to_q_lora.down.weight",
    f"unet.{UNET}.processor.to_out_lora.up.weight",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight",
    f"unet.{UNET}.to_q.lora.down.weight",
    f"unet.{UNET}.to_out.0.lora.up.weight",
    f"unet.{UNET}.to_q.lora_A.weight",
    "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight",
    "transformer_2.blocks.0.attn1.to_q.lora_A.weight",
    "transformer.blocks.0.attn1.to_q.lora_A.weight",
    "transformer.single_transformer_blocks.0.proj_out.lora_B.weight",
    "prior.blocks.0.to_q.lora_A.weight",
    f"{UNET}.to_q.down",
]
# Language models whose own paths begin as diffusers' components do: plain PEFT without a prefix.
NOT_DIFFUSERS = [
    "transformer.h.0.attn.c_attn.lora_A.weight",
    "transformer.encoder.layers.0.self_attention.query_key_value.lora_A.weight",
    "transformer.blocks.0.attn.Wqkv.lora_A.weight",
    "transformer.blocks.0.ffn.up_proj.lora_A.weight",
    "transformer.word_embeddings.lora_embedding_A",
    "transformer.wte.lora_embedding_A",
]


def saved(keys: list[str], path: Path) -> str:
    save_file({key: torch.ones(2, 2) for key in keys}, path / "a.safetensors")
    return str(path / "a.safetensors")


def test_every_recognised_layout_has_its_keys_here() -> None:
    assert set(MINIMAL) == {foreign.name for foreign in FOREIGN}


@pytest.mark.parametrize("name", MINIMAL)
def test_a_foreign_layout_is_refused_by_its_name_with_a_hint(name: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError) as refused:
        open_adapter(saved(MINIMAL[name], tmp_path))
    assert f"is in the {name} layout, which loramerge does not read yet." in refused.value.message
    assert refused.value.hint


@pytest.mark.parametrize("key", DIFFUSERS)
def test_every_spelling_of_diffusers_is_diffusers(key: str) -> None:
    found = recognise([key])
    assert found is not None
    assert found.name == "diffusers"


@pytest.mark.parametrize("key", NOT_DIFFUSERS)
def test_a_language_model_with_a_transformer_is_not_diffusers(key: str) -> None:
    assert recognise([key]) is None


def test_layouts_that_are_read_are_not_foreign() -> None:
    fixtures = Path(__file__).parents[1] / "fixtures"
    for layout in layouts():
        for path in (fixtures / layout.name).rglob("*.safetensors"):
            assert open_adapter(str(path)).layout == layout.name


def test_one_foreign_key_among_known_ones_is_enough(tmp_path: Path) -> None:
    keys = [f"{PEFT}.lora_A.weight", f"{PEFT}.lora_B.weight", "q.randlora_lambda"]
    with pytest.raises(AdapterError, match="RandLoRA layout"):
        open_adapter(saved(keys, tmp_path))


def test_two_known_layouts_in_one_file_are_told_apart(tmp_path: Path) -> None:
    keys = [
        f"{PEFT}.lora_A.weight",
        f"{PEFT}.lora_B.weight",
        "lora_unet_a.lora_down.weight",
    ]
    with pytest.raises(AdapterError, match=r"looks like peft, but .* lora_unet_a\.lora_down"):
        open_adapter(saved(keys, tmp_path))
