"""PEFT's target_parameters: experts as three-dimensional parameters, against its own deltas."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file
from torch import nn

from loramerge.errors import AdapterError
from loramerge.io._open import open_adapter
from tests.typed import typed

EXPERTS, HIDDEN, INNER, RANK = 4, 6, 5, 2
NAMES = ["experts.gate_up_proj", "experts.down_proj"]


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(EXPERTS, 2 * INNER, HIDDEN))
        self.down_proj = nn.Parameter(torch.zeros(EXPERTS, HIDDEN, INNER))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Module() for _ in range(2)])
        for layer in self.layers:
            layer.experts = Experts()
            layer.q = nn.Linear(HIDDEN, HIDDEN)


def trained(folder: Path, seed: int = 0, targets: list[str] | None = None) -> PeftModel:
    torch.manual_seed(seed)
    config = LoraConfig(
        r=RANK, lora_alpha=6, target_modules=["q"], target_parameters=targets or NAMES
    )
    model = get_peft_model(Model(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def deltas(model: PeftModel) -> dict[str, np.ndarray]:
    """PEFT's delta of every expert, under the name we give it."""
    found = {}
    for path, module in model.base_model.model.named_modules():
        if isinstance(module, ParamWrapper):
            stem = path.replace(".base_layer", "")
            for expert, delta in enumerate(module.get_delta_weight("default")):
                name = f"{stem}.{expert}.{module.parameter_name}"
                found[name] = delta.detach().double().numpy()
    return found


def near(found: np.ndarray, wanted: np.ndarray) -> None:
    # float32 products, added up in another order
    np.testing.assert_allclose(found, wanted, atol=2e-6 * np.abs(wanted).max())


# PEFT takes the parameters as the model defines them; the order of its config changes nothing.
@pytest.mark.parametrize("targets", [NAMES, NAMES[::-1], NAMES[:1], NAMES[1:]], ids=str)
def test_every_expert_is_read_as_peft_reads_it(targets: list[str], tmp_path: Path) -> None:
    wanted = deltas(trained(tmp_path, targets=targets))
    adapter = open_adapter(str(tmp_path))
    read = {name for name, module in adapter.modules.items() if module.kind == "parameter"}
    assert read == set(wanted)
    assert len(wanted) == 2 * EXPERTS * len(targets)
    for name, delta in wanted.items():
        update = adapter.read(name)
        near(update.B @ update.A, delta)


def test_a_merge_of_experts_computes_the_sum_in_peft(tmp_path: Path) -> None:
    one, two = (deltas(trained(tmp_path / str(seed), seed)) for seed in (1, 2))
    done = typed(
        "cat", tmp_path / "1", tmp_path / "2", "-w", "1", "-w", "-0.5", "-o", tmp_path / "o"
    )
    assert done.code == 0, done.err
    merged = deltas(PeftModel.from_pretrained(Model(), tmp_path / "o"))
    assert set(merged) == set(one)
    for name, delta in merged.items():
        near(delta, one[name] - 0.5 * two[name])


def test_what_is_written_has_the_keys_and_shapes_of_peft(tmp_path: Path) -> None:
    trained(tmp_path / "in")
    assert typed("cat", tmp_path / "in", "-o", tmp_path / "out").code == 0
    before, after = (
        load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("in", "out")
    )
    assert {k: v.shape for k, v in after.items()} == {k: v.shape for k, v in before.items()}


def test_one_parameter_of_two_may_be_left_out(tmp_path: Path) -> None:
    wanted = deltas(trained(tmp_path / "in"))
    done = typed("cat", tmp_path / "in", "--exclude", "*.down_proj", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_parameters"] == NAMES[:1]
    found = deltas(PeftModel.from_pretrained(Model(), tmp_path / "out"))
    assert set(found) == {name for name in wanted if name.endswith("gate_up_proj")}
    for name, delta in found.items():
        near(delta, wanted[name])


@pytest.mark.parametrize("expert", [0, 2, EXPERTS - 1])
def test_one_expert_of_many_may_not(expert: int, tmp_path: Path) -> None:
    trained(tmp_path / "in")
    glob = f"*.{expert}.down_proj"
    done = typed("cat", tmp_path / "in", "--exclude", glob, "-o", tmp_path / "out")
    assert done.code == 1
    assert f"PEFT holds all experts of a layer; numbers {expert} would be missing" in done.err
    assert not (tmp_path / "out").exists()


def test_a_bare_file_of_ours_still_knows_its_experts(tmp_path: Path) -> None:
    trained(tmp_path / "in")
    out = tmp_path / "one.safetensors"
    assert typed("cat", tmp_path / "in", "-o", out).code == 0
    one, two = open_adapter(str(tmp_path / "in")), open_adapter(str(out))
    assert set(one.modules) == set(two.modules)


def test_a_bare_file_that_does_not_is_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"experts, which only target_parameters"):
        open_adapter(str(tmp_path))


def test_ranks_that_are_no_multiple_of_the_configs_are_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "r": 3}))
    with pytest.raises(AdapterError, match=r"has 8 ranks at nest 1; its config says r 3"):
        open_adapter(str(tmp_path))
