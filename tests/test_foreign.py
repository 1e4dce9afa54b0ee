"""Layouts that are recognised and not read: each named by its keys, with something to do next."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loramerge.errors import AdapterError
from loramerge.io._foreign import FOREIGN
from loramerge.io._open import layouts, open_adapter

PEFT = "base_model.model.model.layers.0.self_attn.q_proj"
# The fewest keys that give a layout away -> its name.
MINIMAL = {
    "Megatron/NeMo": [
        "decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight",
        "decoder.layers.0.self_attention.linear_qkv.adapter.linear_out.weight",
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
}


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


@pytest.mark.parametrize(
    ("layout", "keys"),
    {
        "torchtune": ["layers.0.attn.v_proj.lora_a.weight", "layers.0.attn.v_proj.lora_b.weight"],
        "bfl": ["double_blocks.0.img_attn.norm.query_norm.scale", "img_in.lora_A.weight"],
    }.items(),
)
def test_keys_beside_those_that_mark_a_layout_are_named(
    layout: str, keys: list[str], tmp_path: Path
) -> None:
    sentence = rf"looks like {layout}, but these keys are not explained: optimizer\.state"
    with pytest.raises(AdapterError, match=sentence):
        open_adapter(saved([*keys, "optimizer.state"], tmp_path))
