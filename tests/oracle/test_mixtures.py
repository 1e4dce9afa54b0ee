"""Experts of real mixtures, as parameters and by themselves, in forward passes of PEFT."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from loramerge.io._open import open_adapter
from tests.typed import typed

# PEFT 0.21 asks transformers 5 by an old name, and warns of patterns it makes while converting.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("FutureWarning", "RuntimeWarning", "UserWarning")
]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
}
TOKENS = torch.tensor([[1, 5, 7, 3, 22]])
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# Base model -> what the first expert's projections are called in its checkpoints.
OWN = {
    "mistralai/Mixtral-8x7B-v0.1": ("block_sparse_moe", {"w1", "w2", "w3"}),
    "Qwen/Qwen3-30B-A3B": ("mlp", {"gate_proj", "up_proj", "down_proj"}),
}


def base(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if "Mixtral" in name:
        return MixtralForCausalLM(MixtralConfig(num_local_experts=4, **SIZES))
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(head_dim=8, **sizes, **SIZES))


def trained(name: str, folder: Path) -> torch.Tensor:
    """Train nothing, but draw an adapter of queries and experts; its logits."""
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], target_parameters=PARAMETERS)
    model = get_peft_model(base(name), config).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) / 2
    model.save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": name}))
    return logits(model)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("name", OWN)
def test_experts_by_themselves_and_back_compute_the_same_in_peft(name: str, tmp_path: Path) -> None:
    wanted = trained(name, tmp_path / "in")
    size = (wanted - logits(base(name))).abs().max()
    before = tmp_path / "in"
    for form in ("split", "experts"):
        after = tmp_path / form
        done = typed("convert", before, "--to", "peft", "--projections", form, "-o", after)
        assert done.code == 0, done.err
        found = logits(PeftModel.from_pretrained(base(name), after).eval())
        # float32 products, added up in another order
        assert (found - wanted).abs().max() < 5e-6 * size
        before = after
    first, again = (open_adapter(str(tmp_path / one)).modules for one in ("in", "experts"))
    assert set(first) == set(again)


@pytest.mark.parametrize("name", OWN)
def test_experts_by_themselves_have_the_names_of_their_checkpoints(
    name: str, tmp_path: Path
) -> None:
    trained(name, tmp_path / "in")
    words = ("convert", tmp_path / "in", "--to", "peft", "--projections", "split")
    assert typed(*words, "-o", tmp_path / "out").code == 0
    block, leaves = OWN[name]
    stem = f"model.layers.0.{block}.experts.0."
    names = open_adapter(str(tmp_path / "out")).modules
    assert {n.removeprefix(stem) for n in names if n.startswith(stem)} == leaves


def test_experts_of_mixtral_are_merged_in_either_form(tmp_path: Path) -> None:
    name = "mistralai/Mixtral-8x7B-v0.1"
    trained(name, tmp_path / "in")
    words = ("convert", tmp_path / "in", "--to", "peft", "--projections", "split")
    assert typed(*words, "-o", tmp_path / "split").code == 0
    both = [tmp_path / "in", tmp_path / "split"]
    for first, second in (both, both[::-1]):
        out = tmp_path / f"of-{first.name}"
        done = typed("cat", first, second, "-w", "1", "-w", "-1", "-o", out)
        assert done.code == 0, done.err
        found = logits(PeftModel.from_pretrained(base(name), out).eval())
        # A difference of equal adapters: rounding is left.
        assert (found - logits(base(name))).abs().max() < 1e-4
