"""PEFT as a judge of what we write: every key has its place, at its rank, in every loader."""

from pathlib import Path

import numpy as np
import pytest
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import nn

from tests.oracle.tiny import (
    SHAPES,
    Layers,
    adapter,
    deltas,
    dense,
    gaussian,
    loaded,
    run,
    stored_ranks,
    weighted,
    worst,
)

FLOAT32 = 1e-6  # float32 storage and PEFT's float32 product cost 1e-7 each


@pytest.mark.parametrize("layout", ["uniform", "pattern"])
def test_load_adapter_finds_every_key_and_no_other(tmp_path: Path, layout: str) -> None:
    factors = gaussian(SHAPES, 4, 1), gaussian(SHAPES, 3, 2, {"lin": 5, "tokens": 1})
    a, b = (adapter(tmp_path / n, f, 8) for n, f in zip("ab", factors, strict=True))
    run("cat", a, b, "-w", "1", "-w", "-0.5", "--layout", layout, "-o", tmp_path / "out")
    model = loaded(a, Layers())
    result = model.load_adapter(str(tmp_path / "out"), "ours")
    assert [key for key in result.missing_keys if ".ours" in key] == []
    assert result.unexpected_keys == []
    wanted = weighted([dense(factors[0], 8), dense(factors[1], 8)], [1, -0.5])
    assert worst(deltas(model, "ours"), wanted) < FLOAT32


def test_hotswap_puts_our_adapter_in_the_place_of_another(tmp_path: Path) -> None:
    # PEFT's hotswap knows no embeddings, and ignores rank_pattern: hence no tokens, and uniform.
    shapes = {name: shape for name, shape in SHAPES.items() if name != "tokens"}
    factors = gaussian(shapes, 4, 1), gaussian(shapes, 3, 2)
    a, b = (adapter(tmp_path / n, f, 8) for n, f in zip("ab", factors, strict=True))
    run("cat", a, b, "-w", "1", "-w", "-0.5", "-o", tmp_path / "out")
    model = loaded(a, Layers())
    hotswap_adapter(model, str(tmp_path / "out"), adapter_name="default")
    wanted = weighted([dense(factors[0], 8), dense(factors[1], 8)], [1, -0.5])
    assert worst(deltas(model), wanted) < FLOAT32


def test_transformers_loads_our_adapter_into_a_model_of_its_own(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2Model

    shapes = {"h.0.attn.c_attn": (24, 8, ()), "h.0.mlp.c_proj": (8, 32, ())}
    factors = gaussian(shapes, 4, 1), gaussian(shapes, 3, 2)
    a, b = (
        adapter(tmp_path / n, f, 8, fan_in_fan_out=True) for n, f in zip("ab", factors, strict=True)
    )
    run("cat", a, b, "-w", "1", "-w", "-0.5", "-o", tmp_path / "out")
    model = GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=8))
    model.load_adapter(str(tmp_path / "out"))
    wanted = weighted([dense(factors[0], 8), dense(factors[1], 8)], [1, -0.5])
    assert worst(deltas(model), wanted) < FLOAT32


@pytest.mark.parametrize(
    "ranks",
    [
        {"lin": 2, "block.lin": 5, "tail.lin": 5},
        {"lin": 5, "block.lin": 2, "tail.lin": 3},
        {"lin": 1, "block.lin": 2, "tail.lin": 5},
        {"lin": 3, "block.lin": 5, "tail.lin": 3},
    ],
    ids=str,
)
def test_a_rank_pattern_gives_every_module_its_own_rank_where_paths_end_alike(
    tmp_path: Path, ranks: dict[str, int]
) -> None:
    factors = gaussian(SHAPES, 4, 1, ranks)
    a = adapter(tmp_path / "a", factors, 8)
    run("cat", a, "--layout", "pattern", "-o", tmp_path / "out")
    assert stored_ranks(tmp_path / "out") == {n: pair[0].shape[0] for n, pair in factors.items()}
    assert worst(deltas(loaded(tmp_path / "out", Layers())), dense(factors, 8)) < FLOAT32


def test_a_dot_in_a_rank_pattern_catches_no_other_named_module(tmp_path: Path) -> None:
    class Dotted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.ModuleDict({"b": nn.Linear(12, 16)})
            self.axb = nn.Linear(12, 16)
            self.lin = nn.Linear(12, 16)

    shapes = dict.fromkeys(("a.b", "axb", "lin"), (16, 12, ()))
    factors = gaussian(shapes, 2, 1, {"axb": 3, "lin": 4})
    a = adapter(tmp_path / "a", factors, 8, r=4, alpha_pattern={})
    run("cat", a, "--layout", "pattern", "-o", tmp_path / "out")
    assert worst(deltas(loaded(tmp_path / "out", Dotted())), dense(factors, 8)) < FLOAT32


def test_peft_expects_no_tensors_for_a_module_left_out(tmp_path: Path) -> None:
    # `lin` stays, and PEFT takes that target for the end of `block.lin` and `tail.lin` too.
    factors = gaussian(SHAPES, 4, 1)
    a = adapter(tmp_path / "a", factors, 8)
    run("cat", a, "--exclude", "*.lin", "-o", tmp_path / "out")
    wanted = {n: d for n, d in dense(factors, 8).items() if n not in ("block.lin", "tail.lin")}
    assert worst(deltas(loaded(tmp_path / "out", Layers())), wanted) < FLOAT32


def test_a_module_of_one_adapter_only_comes_out_with_its_weight(tmp_path: Path) -> None:
    factors = gaussian(SHAPES, 4, 1), gaussian({"lin": SHAPES["lin"], "conv": SHAPES["conv"]}, 3, 2)
    a, b = (adapter(tmp_path / n, f, 8) for n, f in zip("ab", factors, strict=True))
    run("cat", a, b, "-w", "2", "-w", "-1", "-o", tmp_path / "out")
    wanted = weighted([dense(factors[0], 8), dense(factors[1], 8)], [2, -1])
    assert worst(deltas(loaded(tmp_path / "out", Layers())), wanted) < FLOAT32


def test_padded_ranks_add_nothing(tmp_path: Path) -> None:
    factors = gaussian(SHAPES, 4, 1, {"lin": 7})
    a = adapter(tmp_path / "a", factors, 8)
    run("cat", a, "--layout", "uniform", "-o", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert np.all(tensors["base_model.model.conv.lora_A.weight"][4:].numpy() == 0)
    assert worst(deltas(loaded(tmp_path / "out", Layers())), dense(factors, 8)) < FLOAT32
