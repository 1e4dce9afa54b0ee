"""LyCORIS files as its own modules save them, and what those modules compute with them.

Its `get_diff_weight` scales LoHa and LoKr twice (4.1); the forward pass is the truth.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lycoris.modules import LoConModule, LohaModule, LokrModule
from peft import LoHaConfig, LoKrConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

from loramerge.io._open import open_adapter
from tests.typed import typed

NAME = "lora_unet_block"
LINEAR, CONVOLUTION = nn.Linear(24, 36), nn.Conv2d(6, 8, 3, padding=1)
CASES: dict[str, tuple[Any, nn.Module, dict[str, Any]]] = {
    "locon": (LoConModule, LINEAR, {}),
    "locon convolution": (LoConModule, CONVOLUTION, {}),
    "locon with a core": (LoConModule, CONVOLUTION, {"use_tucker": True}),
    "loha": (LohaModule, LINEAR, {}),
    "loha of full rank": (LohaModule, LINEAR, {"lora_dim": 8}),
    "loha with cores": (LohaModule, CONVOLUTION, {"use_tucker": True}),
    "lokr": (LokrModule, LINEAR, {"factor": 4, "lora_dim": 2}),
    "lokr of two full factors": (LokrModule, LINEAR, {"factor": 4, "full_matrix": True}),
    "lokr both split": (LokrModule, LINEAR, {"factor": 6, "lora_dim": 1, "decompose_both": True}),
    "lokr with a core": (LokrModule, CONVOLUTION, {"use_tucker": True, "lora_dim": 2}),
    "lokr convolution": (LokrModule, CONVOLUTION, {"full_matrix": True}),
    "rank-stabilised": (LohaModule, LINEAR, {"rs_lora": True}),
}


def trained(case: str, path: Path) -> nn.Module:
    """A module of LyCORIS with random weights, saved under the names kohya's files have."""
    kind, layer, options = CASES[case]
    torch.manual_seed(0)
    module = kind(NAME, layer, **{"lora_dim": 4, "alpha": 2, "bypass_mode": False, **options})
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter) / 4
    tensors = {f"{NAME}.{key}": value for key, value in module.custom_state_dict().items()}
    tensors.setdefault(f"{NAME}.alpha", module.alpha)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return module


def added(module: nn.Module, layer: nn.Module, x: torch.Tensor) -> np.ndarray:
    """What the module adds to its layer's output."""
    with torch.no_grad():
        return (module(x) - layer(x)).double().numpy()


def computed(path: Path, layer: nn.Module, x: torch.Tensor) -> np.ndarray:
    """What the update that we read adds."""
    update = open_adapter(str(path)).read(NAME)
    weight = torch.from_numpy(update.B @ update.A).reshape(layer.weight.shape)
    with torch.no_grad():
        if isinstance(layer, nn.Conv2d):
            return nn.functional.conv2d(x, weight, padding=1).double().numpy()
        return (x @ weight.T).double().numpy()


def inputs(layer: nn.Module) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 6, 5, 5) if isinstance(layer, nn.Conv2d) else torch.randn(3, 24)


@pytest.mark.parametrize("case", CASES)
def test_a_file_computes_what_its_module_does(case: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    module, layer = trained(case, path), CASES[case][1]
    x = inputs(layer)
    wanted = added(module, layer, x)
    # float32 forward passes, less the layer's own output
    np.testing.assert_allclose(computed(path, layer, x), wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("case", CASES)
def test_as_plain_lora_in_kohyas_layout_it_computes_the_same(case: str, tmp_path: Path) -> None:
    path, out = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    trained(case, path)
    done = typed("cat", path, "-o", out)
    assert done.code == 0, done.err
    assert open_adapter(str(out)).layout == "kohya"
    layer = CASES[case][1]
    x = inputs(layer)
    wanted = computed(path, layer, x)
    np.testing.assert_allclose(computed(out, layer, x), wanted, atol=1e-5 * np.abs(wanted).max())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.c = nn.Linear(24, 36), nn.Conv2d(6, 8, 3)


TARGETS = {"target_modules": ["q"], "alpha": 6}
CONFIGS = {
    "loha": LoHaConfig(r=3, **TARGETS),
    "loha with cores": LoHaConfig(r=3, alpha=6, target_modules=["c"], use_effective_conv2d=True),
    "lokr": LoKrConfig(r=2, **TARGETS),
    "lokr of two full factors": LoKrConfig(r=32, **TARGETS),
    "lokr both split": LoKrConfig(r=1, decompose_both=True, **TARGETS),
    "patterns": LoHaConfig(r=3, rank_pattern={"q": 2}, alpha_pattern={"q": 3}, **TARGETS),
}


def saved(config: PeftConfig, folder: Path) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(Model(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", CONFIGS)
def test_pefts_products_are_read_and_written_as_plain_lora(case: str, tmp_path: Path) -> None:
    model = saved(CONFIGS[case], tmp_path / "in")
    done = typed("cat", tmp_path / "in", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    plain = PeftModel.from_pretrained(Model(), tmp_path / "out")
    name = next(iter(open_adapter(str(tmp_path / "in")).modules))
    found, wanted = (
        m.base_model.model.get_submodule(name).get_delta_weight("default").detach().numpy()
        for m in (plain, model)
    )
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
