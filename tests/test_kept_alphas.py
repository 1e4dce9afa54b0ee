"""convert --alphas keep: alphas that differ, in PEFT's alpha_pattern instead of in B."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file

from loramerge.io._open import open_adapter
from tests.build import write_kohya, write_peft
from tests.typed import typed

RNG = np.random.default_rng(0)
# Rank and alpha: a third of a float16 rounds when it is folded, and 0.1 is none.
MODULES = {
    "lora_unet_down_blocks_0_attentions_0_proj_in": (2, 1.0),
    "lora_unet_down_blocks_0_attentions_0_proj_out": (3, 1.0),
    "lora_unet_mid_block_attentions_0_proj_in": (4, 0.1),
}


def kohya(path: Path) -> Path:
    """A UNet's file in float16, with ranks and alphas of its own for each module."""
    pairs = {
        name: (
            RNG.standard_normal((rank, 6)).astype(np.float16),
            RNG.standard_normal((6, rank)).astype(np.float16),
            alpha,
        )
        for name, (rank, alpha) in MODULES.items()
    }
    return write_kohya(path, pairs, dtype="float16")


@pytest.mark.parametrize("single", [False, True], ids=["directory", "file"])
def test_a_kohya_file_comes_back_from_peft_bit_for_bit(single: bool, tmp_path: Path) -> None:
    source = kohya(tmp_path / "a.safetensors")
    there = tmp_path / ("b.safetensors" if single else "b")
    assert typed("convert", source, "--to", "peft", "--alphas", "keep", "-o", there).code == 0
    done = typed("convert", there, "--to", "kohya", "-o", tmp_path / "c.safetensors")
    assert done.code == 0, done.err
    before, after = load_file(source), load_file(tmp_path / "c.safetensors")
    assert before.keys() == after.keys()
    for key, values in before.items():
        # Alphas as numbers: they are written as float32.
        assert np.array_equal(values, after[key])
    scales = (open_adapter(str(p)).modules for p in (source, tmp_path / "c.safetensors"))
    first, second = ({n: m.scaling for n, m in modules.items()} for modules in scales)
    assert first == second


def test_peft_reads_every_alpha_as_it_is_kept(tmp_path: Path) -> None:
    path = write_peft(
        tmp_path / "a",
        {name: (np.ones((2, 6), "f4"), np.ones((6, 2), "f4")) for name in ("lin", "x.lin", "y")},
        r=2,
        lora_alpha=4,
        alpha_pattern={"x.lin": 3, "y": 0.1},
    )
    assert (
        typed("convert", path, "--to", "peft", "--alphas", "keep", "-o", tmp_path / "b").code == 0
    )
    base = torch.nn.ModuleDict(
        {
            "lin": torch.nn.Linear(6, 6),
            "x": torch.nn.ModuleDict({"lin": torch.nn.Linear(6, 6)}),
            "y": torch.nn.Linear(6, 6),
        }
    )
    model = PeftModel.from_pretrained(base, tmp_path / "b")
    found = {
        name.removeprefix("base_model.model."): module.scaling["default"]
        for name, module in model.named_modules()
        if hasattr(module, "scaling")
    }
    assert found == {"lin": 2.0, "x.lin": 1.5, "y": 0.05}


def test_without_it_alphas_are_folded_and_the_note_says_how_not_to(tmp_path: Path) -> None:
    done = typed("convert", kohya(tmp_path / "a.safetensors"), "--to", "peft", "-o", tmp_path / "b")
    assert "--alphas keep writes an alpha_pattern" in done.err
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["alpha_pattern"] == {}


def test_only_peft_has_a_place_for_kept_alphas(tmp_path: Path) -> None:
    source = kohya(tmp_path / "a.safetensors")
    done = typed("convert", source, "--to", "kohya", "--alphas", "keep", "-o", tmp_path / "b")
    assert done.code == 2
    assert "kohya has no alpha_pattern" in done.err


def test_what_was_kept_is_reproduced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kohya(tmp_path / "a.safetensors")
    words = ("convert", "a.safetensors", "--to", "peft", "--alphas", "keep", "-o", "b")
    assert typed(*words).code == 0
    done = typed("reproduce", "b")
    assert done.code == 0, done.err
    assert "--alphas keep" in (tmp_path / "b" / "README.md").read_text()
