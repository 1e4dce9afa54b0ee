"""PEFT as a judge of what we write: the delta weights it finds are the dense references."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
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
    stored_ranks,
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
    for size in range(4500, 7500, 100):
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
