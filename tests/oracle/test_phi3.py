"""Fused projections in forward passes of PEFT: Phi-3 has them, Llama has their parts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from tests.build import write_peft
from tests.oracle.test_mixtures import SIZES, logits
from tests.typed import typed

# PEFT 0.21 asks transformers 5 by an old name.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
# What the two models have defaults of their own for is the same here.
SAME = {
    **SIZES,
    "rms_norm_eps": 1e-5,
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
# Rows of each projection; all read 32 features.
ROWS = {
    "self_attn.q_proj": 32,
    "self_attn.k_proj": 16,
    "self_attn.v_proj": 16,
    "mlp.gate_proj": 48,
    "mlp.up_proj": 48,
}
FUSED = {"self_attn.qkv_proj": list(ROWS)[:3], "mlp.gate_up_proj": list(ROWS)[3:]}


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SAME))


def phi3() -> nn.Module:
    """The same model, its projections one below the other."""
    model, weights = Phi3ForCausalLM(Phi3Config(**SAME)), llama().state_dict()
    stem = "model.layers.0."
    for whole, parts in FUSED.items():
        rows = [weights.pop(f"{stem}{part}.weight") for part in parts]
        weights[f"{stem}{whole}.weight"] = torch.cat(rows)
    model.load_state_dict(weights)
    return model


@pytest.fixture
def adapter(tmp_path: Path, rng: np.random.Generator) -> Path:
    """An adapter of the projections by themselves."""
    modules = {
        f"model.layers.0.{name}": (rng.standard_normal((2, 32)), rng.standard_normal((rows, 2)))
        for name, rows in ROWS.items()
    }
    return write_peft(tmp_path / "split", modules, lora_alpha=1)


def test_fused_projections_are_those_of_phi_3_and_come_back(adapter: Path, tmp_path: Path) -> None:
    words = ("--heads", "4,2", "--to", "peft", "--projections")
    assert typed("convert", adapter, *words, "fused", "-o", tmp_path / "fused").code == 0
    done = typed("convert", tmp_path / "fused", *words, "split", "-o", tmp_path / "again")
    assert done.code == 0, done.err
    wanted = logits(PeftModel.from_pretrained(llama(), adapter))
    size = (wanted - logits(llama())).abs().max()
    for base, path in ((phi3(), tmp_path / "fused"), (llama(), tmp_path / "again")):
        found = logits(PeftModel.from_pretrained(base, path))
        # float32 products, added up in another order
        assert (found - wanted).abs().max() < 5e-6 * size


def test_of_fused_projections_is_said_which_models_have_them(adapter: Path, tmp_path: Path) -> None:
    words = ("--to", "peft", "--projections", "fused", "-o", tmp_path / "fused")
    done = typed("convert", adapter, *words)
    said = "qkv_proj and gate_up_proj are layers of Phi-3 and Phi-4; GLM-4 has the latter alone"
    assert said in done.err
    with pytest.raises(ValueError, match="not found in the base model"):
        PeftModel.from_pretrained(llama(), tmp_path / "fused")
