"""Tiny torch models of every layer kind, adapters for them, and dense float64 references."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from loramerge.cli import cli
from tests.build import Pair, write_peft

Deltas = dict[str, np.ndarray]
PREFIX = "base_model.model."


class Block(nn.Module):
    """A nested module; the path of the model's own `lin` is the end of that of its `lin`."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(14, 18)
        self.proj = nn.Linear(18, 9, bias=False)


class Layers(nn.Module):
    """Linear (one path is the end of two others), convolutions, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(12, 16)
        self.block = Block()
        self.tail = Block()
        self.point = nn.Conv2d(10, 13, 1)
        self.conv = nn.Conv2d(5, 11, 3)
        self.tokens = nn.Embedding(20, 15)


class Transposed(nn.Module):
    """GPT-2's Conv1D, whose weight is [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList([nn.ModuleDict({"c_attn": Conv1D(21, 12), "c_proj": Conv1D(12, 9)})])


# Module -> (out, in, kernel) of A [r, in, *kernel] and B [out, r, 1...], as PEFT stores them.
SHAPES: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "lin": (16, 12, ()),
    "block.lin": (18, 14, ()),
    "block.proj": (9, 18, ()),
    "tail.lin": (18, 14, ()),
    "point": (13, 10, (1, 1)),
    "conv": (11, 5, (3, 3)),
    "tokens": (15, 20, ()),
}
TRANSPOSED = {"h.0.c_attn": (21, 12, ()), "h.0.c_proj": (12, 9, ())}


def gaussian(
    shapes: Mapping[str, tuple[int, int, tuple[int, ...]]],
    rank: int,
    seed: int,
    ranks: Mapping[str, int] | None = None,
) -> dict[str, Pair]:
    """Random factors of every module; `ranks` are those that differ from `rank`."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, (out, into, kernel) in shapes.items():
        r = (ranks or {}).get(name, rank)
        A = rng.standard_normal((r, into, *kernel)).astype(np.float32)
        B = rng.standard_normal((out, r, *(1,) * len(kernel))).astype(np.float32)
        made[name] = (A, B)
    return made


def adapter(path: Path, factors: Mapping[str, Pair], alpha: float, **config: Any) -> Path:
    """A PEFT directory whose rank_pattern names every module by its full path, longest first."""
    ordered = sorted(factors, key=len, reverse=True)
    return write_peft(
        path,
        factors,
        lora_alpha=alpha,
        embeddings=("tokens",),
        rank_pattern={name: factors[name][0].shape[0] for name in ordered},
        **config,
    )


def dense(factors: Mapping[str, Pair], alpha: float) -> Deltas:
    """alpha / r * B @ A of every module in float64, [out, in * kernel]."""
    found = {}
    for name, (A, B) in factors.items():
        r = A.shape[0]
        flat = B.reshape(-1, r).astype(np.float64) @ A.reshape(r, -1).astype(np.float64)
        found[name] = alpha / r * flat
    return found


def weighted(parts: list[Deltas], weights: list[float]) -> Deltas:
    """The weighted sum of dense delta weights; a module absent from one counts as zero there."""
    total: Deltas = {}
    for part, weight in zip(parts, weights, strict=True):
        for name, delta in part.items():
            total[name] = total.get(name, 0.0) + weight * delta
    return total


def truncated(delta: np.ndarray, rank: int) -> np.ndarray:
    """The best approximation of a dense matrix of this rank, by NumPy's dense SVD."""
    U, s, Vh = np.linalg.svd(delta, full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ Vh[:rank]


def run(*arguments: str | Path) -> None:
    """The command line, in this process."""
    cli.main([str(argument) for argument in arguments], standalone_mode=False)


def loaded(path: Path, model: nn.Module) -> PeftModel:
    """A model with an adapter, as PEFT loads it; every warning of PEFT is an error in tests."""
    return PeftModel.from_pretrained(model, str(path)).eval()


def deltas(model: nn.Module, name: str = "default") -> Deltas:
    """PEFT's own delta weights, turned back to [out, in * kernel]."""
    found = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if name not in layer.lora_A and name not in layer.lora_embedding_A:
            continue
        delta = layer.get_delta_weight(name).detach().double().numpy()
        base = layer.get_base_layer()
        turned = delta.T if isinstance(base, nn.Embedding | Conv1D) else delta
        found[path.removeprefix(PREFIX)] = turned.reshape(turned.shape[0], -1)
    return found


def worst(found: Deltas, wanted: Deltas) -> float:
    """The largest relative Frobenius error of any module. Both must hold the same modules."""
    assert found.keys() == wanted.keys()
    return max(
        float(np.linalg.norm(found[name] - wanted[name]) / np.linalg.norm(wanted[name]))
        for name in wanted
    )


def stored_ranks(path: Path) -> dict[str, int]:
    """Module -> rank in the file of a PEFT directory, by the safetensors library."""
    with safe_open(path / "adapter_model.safetensors", "pt") as file:
        return {
            key.split(".lora_")[0].removeprefix(PREFIX): file.get_slice(key).get_shape()[0]
            for key in sorted(file.keys())
            if ".lora_A" in key or ".lora_embedding_A" in key
        }
