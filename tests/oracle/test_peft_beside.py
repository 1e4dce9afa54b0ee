"""What PEFT saves beside LoRA, or scales otherwise: our files do to the model what PEFT's do."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from tests.typed import typed


class Model(nn.Module):
    """Something with everything that is saved beside."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.lin = nn.Linear(8, 6)
        self.other = nn.Linear(6, 6)
        self.score = nn.Linear(6, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.score(torch.relu(self.other(torch.relu(self.lin(self.embed(tokens))))))


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"modules_to_save": ["score"]},
        {"trainable_token_indices": {"embed": [1, 5]}},
        {"bias": "all", "modules_to_save": ["score"], "use_rslora": True},
    ],
    ids="+".join,
)
@pytest.mark.parametrize("words", [("convert", "--to", "peft"), ("squeeze", "--rank", "2")])
def test_the_model_computes_the_same_with_ours(
    words: tuple[str, ...], config: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base = Model()
    wishes = {"r": 4 if words[0] == "convert" else 2, "lora_alpha": 6, "target_modules": ["lin"]}
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**(wishes | config)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) / 3
    model.save_pretrained(tmp_path / "theirs")
    done = typed(words[0], tmp_path / "theirs", *words[1:], "-o", tmp_path / "ours")
    assert done.code == 0, done.err
    ours = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    tokens = torch.arange(12)
    with torch.no_grad():
        assert not torch.allclose(model(tokens), base(tokens), atol=1e-2)
        # float32, where ours folds the scale or takes an SVD.
        torch.testing.assert_close(ours(tokens), model(tokens), rtol=0, atol=1e-5)
