"""PEFT trains on from what `squeeze --step` writes: every rank of every module has a gradient."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from tests.oracle.tiny import SHAPES, Layers, adapter, gaussian, run


def factors_of(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The gradients of A [r, .] and B [r, .] of every module."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in model.named_modules():
        for stem in ("lora_", "lora_embedding_"):
            pair = [getattr(layer, f"{stem}{letter}", {}) for letter in "AB"]
            if not all("default" in part for part in pair):
                continue
            A, B = (part["default"] for part in pair)
            A, B = (getattr(part, "weight", part).grad for part in (A, B))
            found[name] = (A.flatten(1), B.flatten(2).mean(2).T if B.dim() > 2 else B.T)
    return found


def outputs(model: PeftModel) -> list[Tensor]:
    """What every kind of layer makes of random inputs."""
    layers = model.base_model.model
    torch.manual_seed(0)
    blocks = [b.proj(b.lin(torch.randn(3, 14))) for b in (layers.block, layers.tail)]
    images = layers.point(torch.randn(2, 10, 4, 4)), layers.conv(torch.randn(2, 5, 6, 6))
    tokens = layers.tokens(torch.arange(20))
    return [layers.lin(torch.randn(7, 12)), *blocks, *images, tokens]


@pytest.mark.parametrize("words", [["--step", "4"], ["--step", "4", "--layout", "pattern"]])
def test_every_rank_has_a_gradient(tmp_path: Path, words: list[str]) -> None:
    pairs = gaussian(SHAPES, 6, 1, {"lin": 2, "conv": 3, "tokens": 1})
    pairs["point"] = (pairs["point"][0], 0 * pairs["point"][1])  # never trained
    run("squeeze", adapter(tmp_path / "a", pairs, 6.0), *words, "-o", tmp_path / "out", "-q")
    model = PeftModel.from_pretrained(Layers(), str(tmp_path / "out"), is_trainable=True)
    sum((output**2).sum() for output in outputs(model)).backward()
    gradients = factors_of(model)
    assert {name.removeprefix("base_model.model.") for name in gradients} >= {"lin", "tokens"}
    for name, (A, B) in gradients.items():
        alive = A.abs().sum(1) + B.abs().sum(1) > 0
        assert bool(alive.all()), name
