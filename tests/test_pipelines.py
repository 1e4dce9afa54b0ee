"""Adapters of diffusion pipelines: spellings, scales and what stands beside the pairs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loramerge.errors import UsageError
from loramerge.io._open import layout, open_adapter
from tests.build import write_kohya
from tests.typed import typed

FIXTURES = Path(__file__).parents[1] / "fixtures"
UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
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


FLUX = "transformer.single_transformer_blocks.0"
HEADER = "lora_adapter_metadata"


@pytest.mark.parametrize("key", DIFFUSERS)
def test_every_spelling_of_diffusers_is_diffusers_and_not_pefts(key: str) -> None:
    assert layout("diffusers").explains(key)
    assert not layout("peft").explains(key)


@pytest.mark.parametrize("key", NOT_DIFFUSERS)
def test_a_language_model_with_a_transformer_is_pefts(key: str) -> None:
    assert not layout("diffusers").explains(key)
    assert layout("peft").explains(key)


@pytest.mark.parametrize("name", ["comfy/wan", "diffusers/today", "xlabs/plain", "onetrainer/omi"])
def test_an_alpha_typed_by_the_user_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="--alpha is for bare PEFT files"):
        open_adapter(str(FIXTURES / f"{name}.safetensors"), alpha=4)


def pairs(*names: str, rank: int = 2) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {
        f"{name}.lora_{end}.weight": torch.randn(shape, generator=draw)
        for name in names
        for end, shape in (("A", (rank, 6)), ("B", (4, rank)))
    }


def saved(path: Path, tensors: dict[str, torch.Tensor], **fields: object) -> Path:
    """A file whose header states fields of the transformer."""
    stated = {f"transformer.{name}": value for name, value in fields.items()}
    save_file(tensors, path, {HEADER: json.dumps(stated)} if stated else None)
    return path


def test_the_header_states_the_scale_of_each_component_by_patterns(tmp_path: Path) -> None:
    names = [f"{FLUX}.attn.to_q", f"{FLUX}.proj_mlp", "text_encoder.text_model.final"]
    fields = {"r": 2, "lora_alpha": 8, "alpha_pattern": {"proj_mlp": 1}, "use_rslora": False}
    adapter = open_adapter(str(saved(tmp_path / "a.safetensors", pairs(*names), **fields)))
    assert [adapter.modules[name].scaling for name in names] == [4.0, 0.5, 1.0]


def test_a_header_that_states_another_rank_is_not_believed_and_named(tmp_path: Path) -> None:
    tensors = pairs(f"{FLUX}.proj_out")
    adapter = open_adapter(str(saved(tmp_path / "a.safetensors", tensors, r=4, lora_alpha=4)))
    assert adapter.modules[f"{FLUX}.proj_out"].scaling == 2.0
    assert "states another rank than the tensors of" in adapter.assumed[0]


def test_a_result_says_its_rank_and_alpha_to_diffusers_for_every_module(tmp_path: Path) -> None:
    """Scale 1 everywhere: with the header, without it, and in ComfyUI, which never reads it."""
    tensors = pairs(f"{FLUX}.attn.to_q", rank=2) | pairs(f"{FLUX}.proj_out", rank=1)
    file = saved(tmp_path / "a.safetensors", tensors)
    done = typed("squeeze", file, "--energy", "1", "--layout", "pattern", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    out = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    with safe_open(out, "pt") as opened:
        stated = json.loads(opened.metadata()[HEADER])
    config = {key.removeprefix("transformer."): value for key, value in stated.items()}
    path = "single_transformer_blocks.0"
    assert (config["r"], config["lora_alpha"]) == (2, 2)
    assert config["rank_pattern"] == config["alpha_pattern"] == {f"{path}.proj_out": 1}
    assert config["target_modules"] == [f"{path}.attn.to_q", f"{path}.proj_out"]
    result = load_file(out)
    for name in (f"{FLUX}.attn.to_q", f"{FLUX}.proj_out"):
        product = [
            t[f"{name}.lora_B.weight"] @ t[f"{name}.lora_A.weight"] for t in (result, tensors)
        ]
        torch.testing.assert_close(*product)


def test_a_difference_of_a_weight_is_merged_and_those_of_norms_are_kept_beside() -> None:
    file, head = FIXTURES / "comfy" / "distilled.safetensors", "diffusion_model.head.head"
    adapter = open_adapter(str(file))
    assert {extra.role for extra in adapter.extras} == {"norm difference", "bias difference"}
    update = adapter.read(head)
    np.testing.assert_array_equal(update.B @ update.A, load_file(file)[f"{head}.diff"].numpy())


def test_omi_files_are_written_again_with_what_was_trained_beside(tmp_path: Path) -> None:
    file, out = FIXTURES / "onetrainer" / "omi.safetensors", tmp_path / "out.safetensors"
    done = typed("squeeze", file, "-r", "2", "-o", out)
    assert done.code == 0, done.err
    before, after = load_file(file), load_file(out)
    assert set(after) == set(before)
    torch.testing.assert_close(after["bundle_emb.<cat>.t5"], before["bundle_emb.<cat>.t5"])
    assert open_adapter(str(out)).layout == "onetrainer"


def test_a_model_whose_original_paths_are_diffusers_own_is_no_omi_file(tmp_path: Path) -> None:
    names = [f"lora_unet_transformer_blocks_{block}_attn_to_q" for block in range(60)]
    pairs = {n: (np.ones((2, 6)), np.ones((6, 2)), 1.0) for n in names}
    path = write_kohya(tmp_path / "qwen.safetensors", pairs)
    done = typed("convert", path, "--to", "onetrainer")
    assert done.code == 1
    assert "takes the original implementation's paths" in done.err
    assert "--to diffusers" in done.err


def test_omi_files_are_written_for_diffusers_with_shift_and_scale_in_place(tmp_path: Path) -> None:
    file = FIXTURES / "onetrainer" / "omi.safetensors"
    words = ("--to", "diffusers", "--extras", "drop", "-o", tmp_path / "out")
    done = typed("convert", file, *words)
    assert done.code == 0, done.err
    stored = load_file(file)
    result = open_adapter(str(tmp_path / "out"))

    def old(name: str) -> torch.Tensor:
        return 0.5 * stored[f"{name}.lora_up.weight"] @ stored[f"{name}.lora_down.weight"]

    def new(name: str) -> torch.Tensor:
        update = result.read(name)
        return torch.from_numpy(update.B @ update.A)

    query = new("transformer.transformer_blocks.0.attn.to_q")
    torch.testing.assert_close(query, old("transformer.double_blocks.0.img_attn.qkv.0"))
    shift, scale = old("transformer.final_layer.adaLN_modulation.1").chunk(2)
    torch.testing.assert_close(new("transformer.norm_out.linear"), torch.cat([scale, shift]))
    text = "encoder.block.0.layer.0.SelfAttention.q"
    torch.testing.assert_close(new(f"text_encoder_2.{text}"), old(f"t5.{text}"))
