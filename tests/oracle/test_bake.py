"""Baking and extracting against PEFT's merge_and_unload and transformers' own loading."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from loramerge.io._open import open_adapter
from tests.typed import typed

# PEFT 0.21 asks transformers 5 by an old name.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
PROJECTIONS = ["q_proj", "v_proj", "down_proj"]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=40,
        )
    )


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40, bos_token_id=0, eos_token_id=0)
    )


def trained(model, folder: Path, **config) -> PeftModel:
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **config))
    torch.manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn_like(parameter) / 5
            # magnitudes stay near the norms they start from
            parameter.data = parameter.data * (1 + noise) if "magnitude" in name else noise
    tuned.save_pretrained(folder)
    return tuned


CASES = {
    "lora": (llama, {"target_modules": PROJECTIONS}),
    "dora": (llama, {"target_modules": PROJECTIONS, "use_dora": True}),
    "head": (llama, {"target_modules": PROJECTIONS, "modules_to_save": ["lm_head"]}),
    "conv1d": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "conv1d dora": (
        *(gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    ),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
}


@pytest.mark.parametrize("case", CASES)
# PEFT warns of embeddings that it saves.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_baked_model_is_the_one_peft_merges(case: str, tmp_path: Path) -> None:
    make, config = CASES[case]
    base = make()
    # Shards, so that an index is read.
    base.save_pretrained(tmp_path / "base", max_shard_size="20kB")
    model = trained(base, tmp_path / "adapter", **config)
    done = typed(
        "bake", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "baked"
    )
    assert done.code == 0, done.err
    merged = model.merge_and_unload().state_dict()
    found = type(base).from_pretrained(tmp_path / "baked").state_dict()
    assert set(found) == set(merged)
    for key, weight in merged.items():
        # float32 products, added up in another order
        torch.testing.assert_close(found[key], weight, rtol=1e-5, atol=1e-5)


def test_what_no_update_touches_stays_to_the_bit_and_in_its_dtype(tmp_path: Path) -> None:
    base = llama()
    trained(llama(), tmp_path / "adapter", target_modules=["q_proj"])
    base.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    done = typed("bake", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    before, after = (
        load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "out")
    )
    assert {key: tensor.dtype for key, tensor in after.items()} == {
        key: tensor.dtype for key, tensor in before.items()
    }
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}


def test_a_dora_becomes_the_best_plain_lora_of_a_rank_with_its_error(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    before = {key: weight.clone() for key, weight in base.state_dict().items()}
    model = trained(base, tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    after = model.merge_and_unload().state_dict()
    out = tmp_path / "plain"
    done = typed("bake", tmp_path / "dora", "--base", tmp_path / "base", "-r", "6", "-o", out)
    assert done.code == 0, done.err
    adapter = open_adapter(str(out))
    lost, whole = 0.0, 0.0
    for name in adapter.modules:
        wanted = (after[f"{name}.weight"] - before[f"{name}.weight"]).double().numpy()
        U, s, Vh = np.linalg.svd(wanted)
        best = (U[:, :6] * s[:6]) @ Vh[:6]
        update = adapter.read(name)
        # Eckart-Young; float32 weights of size 1 less each other
        np.testing.assert_allclose(update.B @ update.A, best, atol=1e-5)
        lost, whole = lost + (s[6:] ** 2).sum(), whole + (s**2).sum()
    assert f"{(lost / whole) ** 0.5:.2g}"[:3] in done.err


def test_a_dora_is_not_merged_without_its_base_and_the_hint_says_how(tmp_path: Path) -> None:
    trained(llama(), tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    done = typed("cat", tmp_path / "dora", "-o", tmp_path / "out")
    assert done.code == 1
    assert "loramerge bake" in done.err


def test_extracting_gives_back_the_update_that_was_added(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(3)
    name = "model.layers.1.mlp.down_proj"
    weights = base.state_dict()
    update = (torch.randn(32, 3) @ torch.randn(3, 48)) / 10
    weights[f"{name}.weight"] += update
    weights["model.norm.weight"] += 0.5
    base.save_pretrained(tmp_path / "tuned")
    out = tmp_path / "lora"
    done = typed("extract", tmp_path / "base", tmp_path / "tuned", "--rank", "3", "-o", out)
    assert done.code == 0, done.err
    adapter = open_adapter(str(out))
    assert list(adapter.modules) == [name]
    found = adapter.read(name)
    # The sum was rounded to float32 once.
    np.testing.assert_allclose(found.B @ found.A, update.numpy(), atol=1e-5)
    assert "model.norm.weight" in done.err  # no matrix: named


def test_a_base_of_another_shape_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    trained(gpt2(), tmp_path / "adapter", target_modules=["c_attn"], fan_in_fan_out=True)
    done = typed("bake", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "out")
    assert done.code == 1
    assert "base has no weight for transformer.h.0.attn.c_attn" in done.err
    assert not (tmp_path / "out").exists()


def test_a_quantised_base_is_refused_with_the_reason(tmp_path: Path) -> None:
    trained(llama(), tmp_path / "adapter", target_modules=["q_proj"])
    (tmp_path / "base").mkdir()
    codes = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(8, 8, dtype=torch.uint8)}
    save_file(codes, tmp_path / "base" / "model.safetensors")
    done = typed("bake", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "out")
    assert done.code == 1
    assert "is quantised" in done.err


def test_an_index_that_leaves_its_directory_is_refused(tmp_path: Path) -> None:
    trained(llama(), tmp_path / "adapter", target_modules=["q_proj"])
    (tmp_path / "base").mkdir()
    index = tmp_path / "base" / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    done = typed("bake", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "out")
    assert done.code == 1
    assert "names files outside its directory" in done.err


@pytest.mark.parametrize("shape", [(4, 1), (1, 4)], ids=["rows", "columns"])
def test_dora_of_lycoris_is_told_by_its_shape_where_the_weight_is_square(
    shape: tuple[int, int], tmp_path: Path
) -> None:
    """As ComfyUI's weight_decompose and LyCORIS' apply_weight_decompose have it, in float64."""
    torch.manual_seed(0)
    W, A, B, m = (torch.randn(*size) for size in ((4, 4), (2, 4), (4, 2), shape))
    name = "lora_unet_mid_block_attentions_0_proj_in"
    base, file = tmp_path / "unet", tmp_path / "dora.safetensors"
    base.mkdir()
    save_file(
        {"mid_block.attentions.0.proj_in.weight": W},
        base / "diffusion_pytorch_model.safetensors",
    )
    save_file(
        {
            f"{name}.lora_down.weight": A,
            f"{name}.lora_up.weight": B,
            f"{name}.alpha": torch.tensor(1.0),
            f"{name}.dora_scale": m,
        },
        file,
    )
    done = typed("bake", file, "--base", base, "--rank", "4", "-o", tmp_path / "a.safetensors")
    assert done.code == 0, done.err
    changed = W.double() + 0.5 * B.double() @ A.double()
    norms = changed.norm(dim=1 if shape == (4, 1) else 0, keepdim=True)
    factors = open_adapter(str(tmp_path / "a.safetensors")).read(name)
    # Computed and stored in float32.
    np.testing.assert_allclose(
        factors.B.astype(np.float64) @ factors.A,
        (m * changed / norms - W).numpy(),
        atol=2e-6,
    )


def test_magnitudes_of_neither_rows_nor_columns_are_refused(tmp_path: Path) -> None:
    name = "lora_unet_x"
    save_file({"x.weight": torch.ones(4, 6)}, tmp_path / "base.safetensors")
    save_file(
        {
            f"{name}.lora_down.weight": torch.ones(2, 6),
            f"{name}.lora_up.weight": torch.ones(4, 2),
            f"{name}.dora_scale": torch.ones(5, 1),
        },
        tmp_path / "dora.safetensors",
    )
    words = ("bake", tmp_path / "dora.safetensors", "--base", tmp_path / "base.safetensors")
    done = typed(*words, "--rank", "2", "-o", tmp_path / "a")
    assert done.code == 1
    assert (
        "is [5, 1]: magnitudes of neither the 4 rows of lora_unet_x nor its 6 columns" in done.err
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_extract_and_split_compute_in_the_dtype_they_are_told(dtype: str, tmp_path: Path) -> None:
    save_file({"x.weight": torch.zeros(4, 4)}, tmp_path / "base.safetensors")
    save_file({"x.weight": torch.eye(4) * 1e-3}, tmp_path / "tuned.safetensors")
    words = (tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", "--rank", "2")
    done = typed("extract", *words, "--compute-dtype", dtype, "-o", tmp_path / "a", "--json")
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "a" / "loramerge.json").read_text())
    assert record["recipe"]["settings"].get("compute_dtype", "float32") == dtype
    done = typed(
        "split", tmp_path / "a", "--every", "1", "--compute-dtype", dtype, "--out-dir", tmp_path
    )
    assert done.code == 0, done.err


def test_a_whole_model_is_baked_without_a_dtype_of_computing(tmp_path: Path) -> None:
    done = typed("bake", "x", "--base", "y", "--compute-dtype", "float64")
    assert done.code == 2
    assert "--compute-dtype is for finding an adapter" in done.err
