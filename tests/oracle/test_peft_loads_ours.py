"""PEFT as a judge of what we write: the delta weights it finds, and that it finds all of them."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import nn

from tests.oracle.tiny import (
    SHAPES,
    TRANSPOSED,
    Deltas,
    Layers,
    Transposed,
    adapter,
    deltas,
    dense,
    gaussian,
    loaded,
    run,
    truncated,
    weighted,
    worst,
)

# float32 storage costs 1e-7 and PEFT multiplies in float32, which costs as much again.
FLOAT32 = 1e-6
WEIGHTS = [0.5, 2.0, -1.0]
SIGNED = ("-w", "0.5", "-w", "2", "-w", "-1")


class Inputs(NamedTuple):
    """Three adapters of one model, with ranks and alphas that differ, and their delta weights."""

    paths: list[Path]
    dense: list[Deltas]
    model: Callable[[], nn.Module]

    @property
    def sum(self) -> Deltas:
        return weighted(self.dense, WEIGHTS)


@pytest.fixture(scope="module", params=["layers", "conv1d"])
def inputs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    directory = tmp_path_factory.mktemp("inputs")
    conv1d = request.param == "conv1d"
    shapes = TRANSPOSED if conv1d else SHAPES
    other = {"h.0.c_proj": 2} if conv1d else {"lin": 5, "conv": 2, "tokens": 1}
    factors = [gaussian(shapes, 4, 1), gaussian(shapes, 3, 2, other), gaussian(shapes, 6, 3)]
    alphas = [8.0, 3.5, 6.0]
    paths = [
        adapter(directory / name, pairs, alpha, fan_in_fan_out=conv1d)
        for name, pairs, alpha in zip("abc", factors, alphas, strict=True)
    ]
    found = [dense(pairs, alpha) for pairs, alpha in zip(factors, alphas, strict=True)]
    return Inputs(paths, found, Transposed if conv1d else Layers)


def cut(sums: Deltas, rank: int) -> Deltas:
    return {name: truncated(delta, rank) for name, delta in sums.items()}


def stored_ranks(path: Path) -> dict[str, int]:
    """Module -> rank, by the safetensors library."""
    tensors = load_file(path / "adapter_model.safetensors")
    return {
        key.split(".lora_")[0].removeprefix("base_model.model."): tensor.shape[0]
        for key, tensor in tensors.items()
        if "lora_A" in key or "lora_embedding_A" in key
    }


@pytest.mark.parametrize("layout", ["uniform", "pattern"])
def test_a_full_rank_sum_is_the_dense_weighted_sum(
    inputs: Inputs, tmp_path: Path, layout: str
) -> None:
    out = tmp_path / "out"
    run("arithmetic", *inputs.paths, *SIGNED, "--rank", "full", "--layout", layout, "-o", out)
    assert worst(deltas(loaded(out, inputs.model())), inputs.sum) < FLOAT32


def test_cat_is_the_dense_weighted_sum(inputs: Inputs, tmp_path: Path) -> None:
    run("cat", *inputs.paths, *SIGNED, "-o", tmp_path / "out")
    assert worst(deltas(loaded(tmp_path / "out", inputs.model())), inputs.sum) < FLOAT32


@pytest.mark.parametrize(("flags", "rank"), [(("--rank", "3"), 3), (("--rank", "max"), 6), ((), 6)])
def test_a_cut_sum_is_the_dense_truncation(
    inputs: Inputs, tmp_path: Path, flags: tuple[str, ...], rank: int
) -> None:
    run("arithmetic", *inputs.paths, *SIGNED, *flags, "-o", tmp_path / "out")
    found = deltas(loaded(tmp_path / "out", inputs.model()))
    assert worst(found, cut(inputs.sum, rank)) < FLOAT32


def test_lambda_multiplies_the_sum(inputs: Inputs, tmp_path: Path) -> None:
    run("cat", *inputs.paths, *SIGNED, "--lambda", "-0.3", "-o", tmp_path / "out")
    wanted = weighted([inputs.sum], [-0.3])
    assert worst(deltas(loaded(tmp_path / "out", inputs.model())), wanted) < FLOAT32


@pytest.mark.parametrize(
    "flags",
    [
        ("--rank", "3"),
        ("--energy", "0.9"),
        ("--energy", "0.9", "--layout", "uniform"),
        ("--max-error", "0.3"),
        ("--size", "5kB"),
        ("--size", "5kB", "--allocate", "relative"),
        ("--rank", "3", "--allocate", "relative"),
        ("--energy", "0.8", "--allocate", "sigma"),
        ("--energy", "0.8", "--allocate", "energy"),
    ],
    ids=" ".join,
)
def test_squeeze_stores_the_dense_truncation_of_every_module(
    inputs: Inputs, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    run("squeeze", inputs.paths[2], *flags, "-o", tmp_path / "out")
    ranks = stored_ranks(tmp_path / "out")
    wanted = {name: truncated(inputs.dense[2][name], rank) for name, rank in ranks.items()}
    assert worst(deltas(loaded(tmp_path / "out", inputs.model())), wanted) < FLOAT32


def test_an_energy_bound_gives_modules_different_ranks(tmp_path: Path) -> None:
    a = adapter(tmp_path / "a", gaussian(SHAPES, 6, 3), 6)
    run("squeeze", a, "--energy", "0.9", "-o", tmp_path / "out")
    assert len(set(stored_ranks(tmp_path / "out").values())) > 1


@pytest.mark.parametrize("allocate", ["uniform", "relative", "sigma", "energy"])
def test_no_file_is_larger_than_its_size_bound(tmp_path: Path, allocate: str) -> None:
    a = adapter(tmp_path / "a", gaussian(SHAPES, 6, 3), 6)
    for size in range(4000, 7000, 100):
        out = tmp_path / f"{size}.safetensors"
        run("squeeze", a, "--size", str(size), "--allocate", allocate, "-o", out)
        assert size * 0.8 < out.stat().st_size <= size


@pytest.mark.parametrize("gauge", ["svd", "balanced", "raw"])
def test_a_cluster_of_every_unit_is_the_dense_weighted_sum(
    inputs: Inputs, tmp_path: Path, gauge: str
) -> None:
    flags = ("-k", "99", "--scale", "1", "--gauge", gauge)
    run("cluster", *inputs.paths, *SIGNED, *flags, "-o", tmp_path / "out")
    assert worst(deltas(loaded(tmp_path / "out", inputs.model())), inputs.sum) < FLOAT32


def test_a_cluster_of_two_copies_is_the_adapter(inputs: Inputs, tmp_path: Path) -> None:
    run("cluster", inputs.paths[2], inputs.paths[2], "-k", "6", "-o", tmp_path / "out")
    assert worst(deltas(loaded(tmp_path / "out", inputs.model())), inputs.dense[2]) < FLOAT32


def test_a_cluster_means_to_peft_the_product_of_its_stored_factors(
    inputs: Inputs, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run("cluster", *inputs.paths, *SIGNED, "-k", "4", "-o", out)
    tensors = load_file(out / "adapter_model.safetensors")
    wanted = {}
    for key, A in tensors.items():
        if ".lora_A" in key or ".lora_embedding_A" in key:
            name = key.split(".lora_")[0].removeprefix("base_model.model.")
            B = tensors[key.replace("_A", "_B")]
            wanted[name] = (B.double().flatten(1) @ A.double().flatten(1)).numpy()
    assert set(stored_ranks(out).values()) == {4}
    assert worst(deltas(loaded(out, inputs.model())), wanted) < FLOAT32


COMMANDS: dict[str, tuple[str, ...]] = {
    "cat": ("cat", *SIGNED),
    "arithmetic": ("arithmetic", *SIGNED, "--rank", "3"),
    "cluster": ("cluster", *SIGNED, "-k", "4"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_factors_are_within_two_ulp_of_the_float32_ones(
    inputs: Inputs, tmp_path: Path, command: str, dtype: str
) -> None:
    name, *flags = COMMANDS[command]
    run(name, *inputs.paths, *flags, "-o", tmp_path / "wide.safetensors")
    narrow = tmp_path / "narrow.safetensors"
    run(name, *inputs.paths, *flags, "--save-dtype", dtype, "-o", narrow)
    check_ulps(tmp_path / "wide.safetensors", narrow)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_squeezed_factors_are_within_two_ulp_of_the_float32_ones(
    inputs: Inputs, tmp_path: Path, dtype: str
) -> None:
    flags = ("--rank", "3", "--allocate", "relative")
    run("squeeze", inputs.paths[0], *flags, "-o", tmp_path / "wide.safetensors")
    narrow = tmp_path / "narrow.safetensors"
    run("squeeze", inputs.paths[0], *flags, "--save-dtype", dtype, "-o", narrow)
    check_ulps(tmp_path / "wide.safetensors", narrow)


def check_ulps(wide: Path, narrow: Path) -> None:
    """Every narrow entry is within two units in the last place of the float32 entry."""
    exact, rounded = load_file(wide), load_file(narrow)
    assert exact.keys() == rounded.keys()
    for key, x in exact.items():
        y = rounded[key]
        info = torch.finfo(y.dtype)
        ulp = info.eps * 2.0 ** (torch.frexp(x.abs().clamp(min=info.tiny)).exponent - 1)
        assert bool(((y.float() - x).abs() <= 2 * ulp).all()), key


@pytest.mark.parametrize("layout", ["uniform", "pattern"])
def test_load_adapter_finds_every_key_and_no_other(
    inputs: Inputs, tmp_path: Path, layout: str
) -> None:
    run("cat", *inputs.paths, *SIGNED, "--layout", layout, "-o", tmp_path / "out")
    model = loaded(inputs.paths[0], inputs.model())
    result = model.load_adapter(str(tmp_path / "out"), "ours")
    assert [key for key in result.missing_keys if ".ours" in key] == []
    assert result.unexpected_keys == []
    assert worst(deltas(model, "ours"), inputs.sum) < FLOAT32


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
