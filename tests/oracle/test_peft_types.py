"""PEFT's other exact low-rank types: what we read against its own delta weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, PeftConfig, PeftModel, VBLoRAConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from loramerge.errors import AdapterError
from loramerge.io._open import open_adapter
from tests.typed import typed

TARGETS = ["q_proj", "k_proj"]
CONFIGS = {
    "adalora": AdaLoraConfig(
        target_modules=TARGETS, init_r=6, target_r=3, lora_alpha=12, total_step=10
    ),
    "vera": VeraConfig(target_modules=TARGETS, r=4),
    "vblora": VBLoRAConfig(target_modules=TARGETS, r=4, num_vectors=10, vector_length=4, topk=3),
    "vblora topk": VBLoRAConfig(
        target_modules=TARGETS,
        r=4,
        num_vectors=10,
        vector_length=4,
        topk=3,
        save_only_topk_weights=True,
    ),
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(16, 16)
        self.k_proj = nn.Linear(16, 8)
        self.o_proj = nn.Linear(12, 16)


def saved(config: PeftConfig, folder: Path) -> PeftModel:
    """A model of this type with random values, and its adapter in a folder."""
    torch.manual_seed(0)
    model = get_peft_model(Attention(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def delta(model: PeftModel, name: str) -> np.ndarray:
    """What PEFT adds to a weight."""
    layer = model.base_model.model.get_submodule(name)
    return layer.get_delta_weight("default").detach().double().numpy()


@pytest.mark.parametrize("kind", CONFIGS)
def test_its_delta_weights_are_read(kind: str, tmp_path: Path) -> None:
    model = saved(CONFIGS[kind], tmp_path)
    adapter = open_adapter(str(tmp_path))
    assert adapter.layout == kind.partition(" ")[0]
    for name in TARGETS:
        update = adapter.read(name)
        wanted = delta(model, name)
        # Both multiply in float32.
        np.testing.assert_allclose(update.B @ update.A, wanted, atol=2e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("kind", CONFIGS)
def test_as_plain_lora_peft_computes_the_same(kind: str, tmp_path: Path) -> None:
    model = saved(CONFIGS[kind], tmp_path / "in")
    done = typed("arithmetic", tmp_path / "in", "--rank", "full", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    plain = PeftModel.from_pretrained(Attention(), tmp_path / "out")
    for name in TARGETS:
        wanted = delta(model, name)
        np.testing.assert_allclose(delta(plain, name), wanted, atol=5e-6 * np.abs(wanted).max())


def test_zero_singular_values_are_no_ranks(tmp_path: Path) -> None:
    saved(CONFIGS["adalora"], tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.q_proj.lora_E"][2:] = 0
    save_file(tensors, path)
    module = open_adapter(str(tmp_path)).modules["q_proj"]
    assert module.rank == 2
    assert module.scaling == pytest.approx(12 / 6.00001)


def test_vera_without_its_projections_is_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="save_projection"):
        config = VeraConfig(target_modules=TARGETS, r=4, save_projection=False)
    saved(config, tmp_path)
    with pytest.raises(AdapterError, match="does not hold vera_A and vera_B"):
        open_adapter(str(tmp_path))


def test_vera_modules_whose_width_only_the_base_knows_are_refused(tmp_path: Path) -> None:
    saved(VeraConfig(target_modules=[*TARGETS, "o_proj"], r=4), tmp_path)
    with pytest.raises(AdapterError, match=r"inputs of o_proj are, only the base model says"):
        open_adapter(str(tmp_path))


@pytest.mark.parametrize("kind", ["vera", "vblora"])
def test_its_biases_are_called_what_every_version_of_lora_knows(kind: str, tmp_path: Path) -> None:
    saved(replace(CONFIGS[kind], bias=f"{kind}_only"), tmp_path / "in")
    assert typed("convert", tmp_path / "in", "--to", "peft", "-o", tmp_path / "out").code == 0
    assert PeftConfig.from_pretrained(tmp_path / "out").bias == "lora_only"
    key = "base_model.model.q_proj.base_layer.bias"
    one, two = (load_file(tmp_path / x / "adapter_model.safetensors")[key] for x in ("in", "out"))
    assert torch.equal(one, two)
