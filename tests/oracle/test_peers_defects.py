"""Defects reproduced in other merge tools: each test says what ours does right."""

import json
from pathlib import Path

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file
from torch import nn

from loramerge.errors import IncompatibleError, OutputError
from loramerge.linalg import _numpy
from tests.build import Pair, write_kohya, write_peft
from tests.oracle.tiny import (
    SHAPES,
    Layers,
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

FLOAT32 = 1e-6  # float32 storage and PEFT's float32 product cost 1e-7 each
LINEAR = {name: shape for name, shape in SHAPES.items() if not shape[2] and name != "tokens"}


Factors = tuple[dict[str, Pair], dict[str, Pair]]


def two(
    tmp_path: Path, ranks: tuple[int, int] = (4, 4), alpha: float = 8, **config: object
) -> tuple[list[Path], Factors]:
    """Two adapters of LINEAR on disk, and their factors."""
    factors = gaussian(LINEAR, ranks[0], 1), gaussian(LINEAR, ranks[1], 2)
    paths = [adapter(tmp_path / n, f, alpha, **config) for n, f in zip("ab", factors, strict=True)]
    return paths, factors


def product(path: Path, name: str) -> np.ndarray:
    """alpha / dim * up @ down of one kohya module, as its readers compute it."""
    tensors = load_file(path)
    down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
    scale = float(tensors[f"{name}.alpha"]) / down.shape[0]
    return scale * up.reshape(up.shape[0], -1).astype(float) @ down.reshape(down.shape[0], -1)


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def kohya(path: Path, rank: int, alpha: float, seed: int) -> np.ndarray:
    """One linear module of a kohya file; returned dense."""
    (A, B) = gaussian({"m": (16, 12, ())}, rank, seed)["m"]
    write_kohya(path, {"lora_unet_m": (A, B, alpha)})
    return alpha / rank * B.astype(float) @ A.astype(float)


def test_alpha_is_applied_once_where_peft_svd_applied_it_twice(tmp_path: Path) -> None:
    paths, factors = two(tmp_path, alpha=8)  # alpha = 2 r, where PEFT <= 0.20 was wrong by 2
    run("arithmetic", *paths, "-w", "0.5", "-w", "0.5", "--rank", "8", "-o", tmp_path / "out")
    wanted = weighted([dense(f, 8) for f in factors], [0.5, 0.5])
    assert worst(deltas(loaded(tmp_path / "out", Layers())), wanted) < FLOAT32


@pytest.mark.parametrize("rank", ["full", "4"])
def test_half_an_adapter_twice_is_the_adapter_where_peft_linear_doubles_it(
    tmp_path: Path, rank: str
) -> None:
    factors = gaussian(LINEAR, 4, 1)
    a = adapter(tmp_path / "a", factors, 8)
    run("arithmetic", a, a, "-w", "0.5", "-w", "0.5", "--rank", rank, "-o", tmp_path / "out")
    assert worst(deltas(loaded(tmp_path / "out", Layers())), dense(factors, 8)) < FLOAT32


def test_a_sum_has_no_cross_terms_where_peft_linear_has(tmp_path: Path) -> None:
    paths, factors = two(tmp_path)
    run("arithmetic", *paths, "--rank", "4", "-o", tmp_path / "out")
    total = weighted([dense(f, 8) for f in factors], [1, 1])
    wanted = {name: truncated(delta, 4) for name, delta in total.items()}
    assert worst(deltas(loaded(tmp_path / "out", Layers())), wanted) < FLOAT32


@pytest.mark.parametrize(
    "command",
    [
        ("cat", "-w", "0.5", "-w", "2"),
        ("arithmetic", "-w", "0.5", "-w", "2", "--rank", "6"),
        ("cluster", "-w", "0.5", "-w", "2", "-k", "10", "--scale", "1"),
    ],
    ids=lambda command: command[0],
)
def test_an_rslora_sum_is_not_over_scaled_by_the_root_of_the_rank_as_in_peft(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    name, *flags = command
    paths, factors = two(tmp_path, (4, 6), use_rslora=True)
    run(name, *paths, *flags, "-o", tmp_path / "out")
    roots = [f["lin"][0].shape[0] ** 0.5 for f in factors]  # alpha / sqrt(r) = alpha / r * sqrt(r)
    parts = [dense(f, 8 * root) for f, root in zip(factors, roots, strict=True)]
    wanted = weighted(parts, [0.5, 2])
    if name == "arithmetic":
        wanted = {module: truncated(delta, 6) for module, delta in wanted.items()}
    assert worst(deltas(loaded(tmp_path / "out", Layers())), wanted) < FLOAT32


def test_a_squeezed_rslora_keeps_its_scale(tmp_path: Path) -> None:
    paths, factors = two(tmp_path, (4, 6), use_rslora=True)
    run("squeeze", paths[1], "--rank", "6", "-o", tmp_path / "out")
    assert (
        worst(deltas(loaded(tmp_path / "out", Layers())), dense(factors[1], 8 * 6**0.5)) < FLOAT32
    )


class Mlp(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 12)


# PEFT takes the bias of lora_B for a sharded weight when it saves.
@pytest.mark.filterwarnings("ignore:.*have invalid shape")
@pytest.mark.parametrize(
    "command",
    [("arithmetic",), ("cat",), ("cluster", "-k", "4"), ("squeeze", "--rank", "2")],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize(("option", "name"), [("use_dora", "DoRA"), ("lora_bias", "lora_bias")])
def test_what_is_more_than_plain_lora_is_refused_where_peft_drops_it_in_silence(
    tmp_path: Path, command: tuple[str, ...], option: str, name: str
) -> None:
    config = LoraConfig(r=4, target_modules=["first", "second"], **{option: True})
    get_peft_model(Mlp(), config).save_pretrained(tmp_path / "a")
    with pytest.raises(IncompatibleError, match=name) as failure:
        run(command[0], tmp_path / "a", *command[1:], "-o", tmp_path / "out")
    assert failure.value.hint
    assert not (tmp_path / "out").exists()


def test_adapters_with_rank_patterns_merge_where_peft_crashes(tmp_path: Path) -> None:
    factors = gaussian(LINEAR, 4, 1, {"lin": 2}), gaussian(LINEAR, 4, 2, {"block.proj": 7})
    paths = [adapter(tmp_path / n, f, 8, r=4) for n, f in zip("ab", factors, strict=True)]
    run("arithmetic", *paths, "-w", "1", "-w", "-1", "--rank", "full", "-o", tmp_path / "out")
    wanted = weighted([dense(f, 8) for f in factors], [1, -1])
    assert worst(deltas(loaded(tmp_path / "out", Layers())), wanted) < FLOAT32


def test_an_existing_output_is_refused_where_peft_silently_does_nothing(tmp_path: Path) -> None:
    paths, _ = two(tmp_path)
    run("arithmetic", *paths, "-o", tmp_path / "out")
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(OutputError, match="exists"):
        run("arithmetic", *paths, "-w", "2", "-w", "2", "-o", tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("weights", [("1", "1"), ("0.5", "0.5"), ("2", "-1")])
@pytest.mark.parametrize("ranks", [(4, 4), (3, 6)])
def test_concatenated_kohya_files_weigh_what_was_asked_for_where_kohya_squares_it(
    tmp_path: Path, ranks: tuple[int, int], weights: tuple[str, str]
) -> None:
    parts = [kohya(tmp_path / f"{r}{i}.safetensors", r, 2.5, i) for i, r in enumerate(ranks)]
    files = [tmp_path / f"{r}{i}.safetensors" for i, r in enumerate(ranks)]
    out = tmp_path / "out.safetensors"
    run("cat", *files, "-w", weights[0], "-w", weights[1], "-o", out)
    wanted = float(weights[0]) * parts[0] + float(weights[1]) * parts[1]
    assert relative(product(out, "lora_unet_m"), wanted) < FLOAT32


def test_added_kohya_files_have_neither_squared_weights_nor_cross_terms(tmp_path: Path) -> None:
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    parts = [kohya(file, 4, 2, seed) for seed, file in enumerate(files)]
    out = tmp_path / "out.safetensors"
    run("arithmetic", *files, "-w", "0.5", "-w", "0.5", "--rank", "4", "-o", out)
    wanted = truncated(0.5 * parts[0] + 0.5 * parts[1], 4)
    assert relative(product(out, "lora_unet_m"), wanted) < FLOAT32


def spiky(rank: int) -> Pair:
    """Factors with a few entries far above the rest, which a clamp at a quantile would cut."""
    A, B = gaussian({"m": (16, 12, ())}, rank, 5)["m"]
    A[0, 3], B[7, 1] = 500.0, -300.0
    return A, B


def test_a_sufficient_rank_loses_nothing_where_kohya_clamps_outliers(tmp_path: Path) -> None:
    A, B = spiky(4)
    write_kohya(tmp_path / "a.safetensors", {"lora_unet_m": (A, B, 4.0)})
    out = tmp_path / "out.safetensors"
    run("squeeze", tmp_path / "a.safetensors", "--rank", "4", "-o", out)
    assert relative(product(out, "lora_unet_m"), B.astype(float) @ A) < FLOAT32


@pytest.mark.parametrize("wanted", [1, 7, 15, 16])
def test_an_energy_bound_keeps_no_rank_too_many_where_kohya_resize_keeps_one(
    tmp_path: Path, wanted: int
) -> None:
    rng = np.random.default_rng(0)
    s = np.linspace(2.0, 1.0, 16)
    out, into = (np.linalg.qr(rng.standard_normal((d, 16)))[0] for d in (40, 30))
    squares = np.cumsum(s**2) / np.sum(s**2)
    energy = (squares[wanted - 1] + (squares[wanted - 2] if wanted > 1 else 0.0)) / 2
    A, B = (s[:, None] * into.T).astype(np.float32), out.astype(np.float32)
    write_kohya(tmp_path / "a.safetensors", {"lora_unet_m": (A, B, 16.0)})
    made = tmp_path / "out.safetensors"
    run("squeeze", tmp_path / "a.safetensors", "--energy", f"{energy:.9f}", "-o", made)
    assert load_file(made)["lora_unet_m.lora_down.weight"].shape[0] == wanted


def test_squeezing_a_peft_directory_reads_its_alpha_where_kohya_resize_takes_one(
    tmp_path: Path,
) -> None:
    factors = gaussian(LINEAR, 6, 1)
    a = write_peft(tmp_path / "a", factors, lora_alpha=24)
    run("squeeze", a, "--rank", "3", "-o", tmp_path / "out")
    wanted = {name: truncated(delta, 3) for name, delta in dense(factors, 24).items()}
    assert worst(deltas(loaded(tmp_path / "out", Layers())), wanted) < FLOAT32


def test_squeezing_a_peft_directory_adds_no_alpha_tensors_and_updates_the_config(
    tmp_path: Path,
) -> None:
    a = write_peft(tmp_path / "a", gaussian(LINEAR, 6, 1), lora_alpha=24)
    run("squeeze", a, "--rank", "3", "-o", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["alpha_pattern"]) == (3, 3, {})
    assert not [
        key for key in load_file(tmp_path / "out" / "adapter_model.safetensors") if "alpha" in key
    ]


def test_the_randomized_sketch_is_as_narrow_as_asked_where_power_mergers_is_full_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    gaussian_kernel = _numpy.gaussian

    def recorded(model: np.ndarray, rows: int, columns: int, seed: int) -> np.ndarray:
        drawn.append(columns)
        return gaussian_kernel(model, rows, columns, seed)

    monkeypatch.setattr(_numpy, "gaussian", recorded)
    A, B = gaussian({"lin": (64, 48, ())}, 32, 1)["lin"]
    a = write_peft(tmp_path / "a", {"lin": (A, B)})
    flags = ("--svd", "randomized", "--rank", "4", "--oversample", "3")
    run("squeeze", a, *flags, "-o", tmp_path / "out")
    assert drawn == [7]


def test_an_energy_bound_cuts_the_file_where_power_merger_only_logs_the_rank(
    tmp_path: Path,
) -> None:
    a = write_peft(tmp_path / "a", gaussian(LINEAR, 6, 1))
    run("squeeze", a, "--energy", "0.5", "-o", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert max(t.shape[0] for key, t in tensors.items() if ".lora_A" in key) < 6
