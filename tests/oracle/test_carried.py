"""What is carried beside a LoRA, as PEFT then has it in the model."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from tests.typed import typed


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.head = nn.Linear(8, 6), nn.Linear(8, 5), nn.Linear(8, 3)


Weights = dict[str, torch.Tensor]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return Model()


def trained(base: Model, name: str, **config: object) -> Weights:
    """An adapter of which everything was trained, and what PEFT makes of the base with it."""
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, lora_alpha=4, **config))
    torch.manual_seed(len(name))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter)
    model.save_pretrained(name)
    return merged(base, name)


def merged(base: Model, name: str) -> Weights:
    """The weights of the base with an adapter loaded and merged by PEFT."""
    return dict(
        PeftModel.from_pretrained(copy.deepcopy(base), name).merge_and_unload().state_dict()
    )


def added(base: Model, first: Weights, second: Weights) -> Weights:
    """The weights with the updates of both."""
    before = base.state_dict()
    names = [name for name in before if name.endswith(".weight")]
    return {name: first[name] + second[name] - before[name] for name in names}


def check(found: Weights, wanted: Weights) -> None:
    for name, weight in wanted.items():
        # Factors and sums in float32.
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_bias_stays_where_its_module_is_adapted_no_more(base: Model, bias: str) -> None:
    whole = trained(base, "a", target_modules=["q", "v"], bias=bias)
    assert typed("select", "a", "--include", "q", "-o", "out").code == 0
    check(merged(base, "out"), {**whole, "v.weight": base.v.weight.data})


def test_a_bias_stays_where_its_module_is_adapted_by_another(base: Model) -> None:
    first = trained(base, "a", target_modules=["q"], bias="all")
    second = trained(base, "bb", target_modules=["q", "v"])
    assert typed("cat", "a", "bb", "--extras", "first", "-o", "out").code == 0
    check(merged(base, "out"), {**first, **added(base, first, second)})


def test_a_head_that_one_saves_and_another_adapts_has_both(base: Model) -> None:
    first = trained(base, "a", target_modules=["q"], modules_to_save=["head"])
    second = trained(base, "bb", target_modules=["q", "head"])
    assert typed("cat", "a", "bb", "--extras", "first", "-o", "out").code == 0
    check(merged(base, "out"), {**first, **added(base, first, second)})


def test_a_bias_whose_module_has_another_name_is_refused(base: Model) -> None:
    trained(base, "a", target_modules=["q", "v"], bias="lora_only")
    done = typed("convert", "a", "--to", "peft", "--rename", "q=k", "-o", "out")
    assert done.code == 1
    assert "1 tensors of modules that have another name in the result" in done.err
    assert "--extras drop" in done.err
