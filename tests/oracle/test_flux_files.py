"""Files of Flux that diffusers converts only whole: fal's Kontext trainer, BFL's control LoRAs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.loaders import lora_conversion_utils as utils
from safetensors.torch import save_file

import loramerge
from loramerge.adapter import Adapter
from loramerge.io._names import renamed
from loramerge.io._names.flux import FLUX
from loramerge.io._open import open_adapter
from tests.oracle.test_diffusers_converters import applied

# The one width that the converters know, and how many blocks they want.
WIDTH, RANK = 3072, 2
BLOCKS = {"double_blocks": 19, "single_blocks": 38}
# Of the final modulation the converter turns the rows of A around as well as those of B.
TURNED = "transformer.norm_out.linear"
Tensors = dict[str, torch.Tensor]


def layers(ends: bool) -> dict[str, tuple[int, int]]:
    """Every layer of the released model, (rows, columns); `ends` are those outside its blocks."""
    found = {}
    for row in FLUX:
        stack = row.name.partition(".")[0]
        rows = (sum(row.shares) or 2) * WIDTH
        for number in range(BLOCKS.get(stack, 1)):
            if stack in BLOCKS or ends or row.name == "final_layer.linear":
                found[row.name.format(number)] = rows, WIDTH
    return found


def pairs(prefix: str, ends: bool) -> Tensors:
    draw = torch.Generator().manual_seed(5)
    tensors = {}
    for name, (rows, columns) in layers(ends).items():
        tensors[f"{prefix}{name}.lora_A.weight"] = torch.randn(RANK, columns, generator=draw)
        tensors[f"{prefix}{name}.lora_B.weight"] = torch.randn(rows, RANK, generator=draw)
    return tensors


def same_as_theirs(ours: Adapter, theirs: Tensors, path: Path) -> None:
    """Module by module the same update of a few inputs."""
    factors = {key: t.clone() for key, t in theirs.items() if ".lora_" in key}
    save_file({k: t for k, t in factors.items() if not k.endswith(".bias")}, path)
    converted = open_adapter(str(path))
    assert set(ours.modules) == set(converted.modules)
    for name in set(ours.modules) - {TURNED}:
        # Neither scales anything.
        np.testing.assert_array_equal(applied(ours, name), applied(converted, name))


def test_kontext_files_of_fal_are_peft_with_the_original_names(tmp_path: Path) -> None:
    tensors = pairs("base_model.model.", ends=False)
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = open_adapter(str(tmp_path / "a.safetensors"))
    assert adapter.layout == "peft"
    theirs = utils._convert_fal_kontext_lora_to_diffusers(tensors)
    same_as_theirs(renamed(adapter, "diffusers"), theirs, tmp_path / "b.safetensors")


@pytest.fixture
def control(tmp_path: Path) -> Tensors:
    """A control LoRA with a bias for each pair and every norm."""
    tensors = pairs("", ends=True)
    for name, (rows, _) in layers(ends=True).items():
        tensors[f"{name}.lora_B.bias"] = torch.randn(rows)
    for number in range(BLOCKS["double_blocks"]):
        for stream in ("img", "txt"):
            for norm in ("query", "key"):
                key = f"double_blocks.{number}.{stream}_attn.norm.{norm}_norm.scale"
                tensors[key] = torch.randn(128)
    for number in range(BLOCKS["single_blocks"]):
        for norm in ("query", "key"):
            tensors[f"single_blocks.{number}.norm.{norm}_norm.scale"] = torch.randn(128)
    save_file(tensors, tmp_path / "a.safetensors")
    return tensors


def test_control_loras_hold_the_pairs_that_diffusers_finds(
    control: Tensors, tmp_path: Path
) -> None:
    adapter = open_adapter(str(tmp_path / "a.safetensors"))
    assert adapter.layout == "bfl"
    theirs = utils._convert_bfl_flux_control_lora_to_diffusers(dict(control))
    assert len(adapter.extras) == sum(key.endswith((".scale", ".bias")) for key in control)
    ours = renamed(adapter, "diffusers")
    same_as_theirs(ours, theirs, tmp_path / "b.safetensors")


def test_a_style_is_merged_into_a_control_lora_which_keeps_norms_and_biases(
    tmp_path: Path,
) -> None:
    control = Path(__file__).parents[2] / "fixtures" / "bfl" / "depth.safetensors"
    style = {
        f"transformer.transformer_blocks.0.attn.to_{x}.lora_{end}.weight": torch.randn(shape)
        for x in "qkv"
        for end, shape in (("A", (2, 6)), ("B", (6, 2)))
    }
    save_file(style, tmp_path / "style.safetensors")
    given = [str(control), str(tmp_path / "style.safetensors")]
    result, report = loramerge.arithmetic(given, extras="first", rank="full")
    before, merged = open_adapter(given[0]), result.adapter
    assert merged.layout == "bfl"
    assert {e.key: merged.source.read(e.key) for e in merged.extras} == {
        e.key: before.source.read(e.key) for e in before.extras
    }
    assert report.relative_error < 1e-2  # stored as bfloat16
