"""SAM_LoRA and cloneofsimo: pairs known by number alone, as published and merged in their sets."""

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
SAM = [
    SHARED / name
    for name in (
        *("samvit-r2/lora_rank2.safetensors", "samvit-r4/lora_rank4.safetensors"),
        *("samvit-r16/lora_rank16.safetensors", "samvit-r4-zeroB/lora.safetensors"),
    )
]
DISNEY = (
    SHARED / "cloneofsimo-disney-r1-ti" / "lora_disney.safetensors",
    SHARED / "cloneofsimo-disney-inpaint-mixed-dtype" / "lora_disney_inpainting.safetensors",
)


@needs_shared
def test_sam_files_of_four_ranks_add_up_exactly(tmp_path: Path) -> None:
    out = tmp_path / "sum.safetensors"
    done = typed("cat", *SAM, "-o", out)
    assert done.code == 0, done.err
    files, merged = [load_file(path) for path in SAM], load_file(out)
    assert set(merged) == set(files[0])
    for number in range(24):
        a, b = f"w_a_{number:03d}", f"w_b_{number:03d}"
        wanted = sum(f[b].astype(float) @ f[a].astype(float) for f in files)
        # Concatenated factors are the stored ones to the bit; the order of the sum is another.
        np.testing.assert_allclose(merged[b].astype(float) @ merged[a], wanted, atol=1e-7)


@needs_shared
def test_even_pairs_are_queries_and_odd_ones_values() -> None:
    names = list(open_adapter(str(SAM[0])).modules)
    assert names[:3] == ["blocks.0.attn.qkv.q", "blocks.0.attn.qkv.v", "blocks.1.attn.qkv.q"]


@needs_shared
def test_a_merge_of_two_stable_diffusion_files_keeps_every_number(tmp_path: Path) -> None:
    out = tmp_path / "sum.safetensors"
    done = typed("cat", *DISNEY, "--extras", "first", "-o", out)
    assert done.code == 0, done.err
    merged, files = load_file(out), [load_file(path) for path in DISNEY]
    assert set(merged) == set(files[0])
    for name in ("unet:2", "unet:10", "text_encoder:47"):
        wanted = sum(f[f"{name}:up"].astype(float) @ f[f"{name}:down"] for f in files)
        found = merged[f"{name}:up"].astype(float) @ merged[f"{name}:down"]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
    np.testing.assert_array_equal(merged["<s1>"], files[0]["<s1>"])


@needs_shared
def test_the_metadata_that_cloneofsimos_loader_reads_is_written(tmp_path: Path) -> None:
    out = tmp_path / "small.safetensors"
    assert typed("squeeze", DISNEY[0], "-r", "1", "-o", out).code == 0
    metadata = open_adapter(str(out)).metadata
    assert set(json.loads(metadata["unet"])) == {"CrossAttention", "Attention", "GEGLU"}
    assert metadata["unet:10:rank"] == "1"
    assert metadata["<s1>"] == "<embed>"


def numbered(path: Path, names: list[str], classes: str = '["A"]') -> Path:
    rng = np.random.default_rng(len(names))
    tensors = {}
    for name in names:
        tensors[f"{name}:down"] = rng.standard_normal((2, 5)).astype(np.float32)
        tensors[f"{name}:up"] = rng.standard_normal((4, 2)).astype(np.float32)
    save_file(tensors, path, {"unet": classes})
    return path


@pytest.mark.parametrize("exclude", ["unet:1", "unet:0"])
def test_a_gap_in_the_numbers_is_refused(tmp_path: Path, exclude: str) -> None:
    path = numbered(tmp_path / "a.safetensors", [f"unet:{i}" for i in range(3)])
    done = typed("squeeze", path, "-r", "1", "--exclude", exclude, "-o", tmp_path / "o.safetensors")
    assert done.code == 1
    assert f"{exclude} would be missing" in done.err
    assert not (tmp_path / "o.safetensors").exists()


def test_a_gap_in_the_numbers_of_sam_is_refused(tmp_path: Path) -> None:
    tensors = {}
    for number in range(4):
        tensors[f"w_a_{number:03d}"] = np.ones((2, 5), np.float32)
        tensors[f"w_b_{number:03d}"] = np.ones((4, 2), np.float32)
    save_file(tensors, tmp_path / "a.safetensors")
    out = tmp_path / "o.safetensors"
    path = tmp_path / "a.safetensors"
    done = typed("squeeze", path, "-r", "1", "--include", "*.v", "-o", out)
    assert done.code == 1
    assert "000 would be missing" in done.err


def test_adapters_that_number_other_classes_do_not_merge(tmp_path: Path) -> None:
    one = numbered(tmp_path / "a.safetensors", ["unet:0"])
    two = numbered(tmp_path / "b.safetensors", ["unet:0"], '["A", "B"]')
    done = typed("cat", one, two, "-o", tmp_path / "o.safetensors")
    assert done.code == 1
    assert "number the modules of unet in different ways" in done.err


def test_classes_in_another_order_are_the_same(tmp_path: Path) -> None:
    one = numbered(tmp_path / "a.safetensors", ["unet:0"], '["B", "A"]')
    two = numbered(tmp_path / "b.safetensors", ["unet:0"], '["A", "B"]')
    assert typed("cat", one, two, "-o", tmp_path / "o.safetensors").code == 0
