"""MLX adapters: as published, merged, and to and from PEFT's layout."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loramerge.io._open import open_adapter
from tests.typed import SHARED, typed

needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs the real adapters of ../shared/adapters"
)
QWEN = [SHARED / f"mlx-qwen05b-it{steps}" for steps in (100, 200)]
FIXTURES = Path(__file__).parents[1] / "fixtures" / "mlx"
LAYER = "model.layers.23.self_attn.q_proj"


def delta(tensors: dict[str, np.ndarray], name: str, scale: float) -> np.ndarray:
    """mlx_lm's own formula, in float64 (LoRALinear.fuse)."""
    a, b = (tensors[f"{name}.lora_{letter}"].astype(float) for letter in "ab")
    return (scale * b.T) @ a.T


@needs_shared
def test_two_checkpoints_merge_to_the_sum_that_mlx_would_compute(tmp_path: Path) -> None:
    out = tmp_path / "sum"
    done = typed("cat", *QWEN, "-w", "0.5", "-w", "0.5", "-o", out)
    assert done.code == 0, done.err
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["num_layers"] == 4
    assert config["lora_parameters"]["rank"] == 16
    assert config["lora_parameters"]["scale"] == 1.0
    assert config["lora_parameters"]["keys"] == ["self_attn.q_proj", "self_attn.v_proj"]
    merged = load_file(out / "adapters.safetensors")
    inputs = [load_file(folder / "adapters.safetensors") for folder in QWEN[1:]]
    inputs.append(load_file(QWEN[0] / "0000100_adapters.safetensors"))
    wanted = sum(0.5 * delta(one, LAYER, 10.0) for one in inputs)
    # The scale is folded into float32 factors: one rounding each.
    np.testing.assert_allclose(delta(merged, LAYER, 1.0), wanted, atol=3e-7 * np.abs(wanted).max())


@needs_shared
def test_the_alpha_in_an_mlx_config_is_named_and_not_used() -> None:
    adapter = open_adapter(str(QWEN[0]))
    assert {m.scaling for m in adapter.modules.values()} == {10.0}
    assert any("alpha in lora_parameters is ignored" in note for note in adapter.assumed)


@needs_shared
def test_no_private_path_of_the_trainer_is_passed_on(tmp_path: Path) -> None:
    out = tmp_path / "small"
    assert typed("squeeze", QWEN[0], "-r", "4", "-o", out).code == 0
    for file in out.iterdir():
        assert b"/Users/" not in file.read_bytes()


def test_an_mlx_file_becomes_a_peft_directory_with_the_same_updates(tmp_path: Path) -> None:
    out = tmp_path / "peft"
    done = typed("cat", FIXTURES / "linear", "--to", "peft", "-o", out)
    assert done.code == 0, done.err
    before, after = open_adapter(str(FIXTURES / "linear")), open_adapter(str(out))
    assert after.layout == "peft"
    for name, module in before.modules.items():
        assert (after.modules[name].kind, after.modules[name].shape) == (module.kind, module.shape)
        one, two = before.read(name), after.read(name)
        # Multiples of 1/8 times 10: exact in float32.
        np.testing.assert_array_equal(two.B @ two.A, one.B @ one.A)


def test_experts_go_to_numbered_modules_and_back(tmp_path: Path) -> None:
    there, back = tmp_path / "peft", tmp_path / "mlx"
    assert typed("cat", FIXTURES / "experts", "--to", "peft", "-o", there).code == 0
    assert "model.layers.3.mlp.experts.2.up_proj" in open_adapter(str(there)).modules
    assert typed("cat", there, "--to", "mlx", "-o", back).code == 0
    stored = load_file(back / "adapters.safetensors")
    key = "model.layers.3.mlp.switch_mlp.up_proj"
    assert stored[f"{key}.lora_a"].shape == (3, 2, 4)
    assert stored[f"{key}.lora_b"].shape == (3, 6, 2)
    before = open_adapter(str(FIXTURES / "experts"))
    for number in range(3):
        update = before.read(f"model.layers.3.mlp.experts.{number}.up_proj")
        found = stored[f"{key}.lora_b"][number] @ stored[f"{key}.lora_a"][number]
        np.testing.assert_array_equal(found, update.B @ update.A)
    config = json.loads((back / "adapter_config.json").read_text())
    assert config["lora_parameters"]["keys"] == ["mlp.switch_mlp.up_proj"]


def test_a_layer_that_lacks_an_expert_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = typed("cat", FIXTURES / "experts", "--exclude", "*.experts.1.*", "-o", out)
    assert done.code == 1
    assert "number 1 is missing" in done.err
    assert not out.exists()


def test_ranks_that_differ_are_padded_to_the_one_rank_of_mlx(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = typed("squeeze", FIXTURES / "linear", "--energy", "0.7", "-o", out)
    assert done.code == 0, done.err
    ranks = {module.rank for module in open_adapter(str(out)).modules.values()}
    assert len(ranks) == 1
    done = typed(
        *("squeeze", FIXTURES / "linear", "--energy", "0.7", "--layout", "pattern", "-o", out)
    )
    assert done.code == 2
    assert "mlx has room for only one rank" in done.err


def test_dora_magnitudes_are_refused_by_name(tmp_path: Path) -> None:
    tensors = load_file(FIXTURES / "bare.safetensors")
    name = next(key for key in tensors if key.endswith(".lora_a")).removesuffix(".lora_a")
    tensors[f"{name}.m"] = np.ones(6, np.float32)
    save_file(tensors, tmp_path / "a.safetensors")
    done = typed("squeeze", tmp_path / "a.safetensors", "-r", "1", "-o", tmp_path / "o")
    assert done.code == 1
    assert "DoRA (magnitude)" in done.err
