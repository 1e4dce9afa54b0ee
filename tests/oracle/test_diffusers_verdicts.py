"""What verify says of files of pipelines, against what diffusers' own loaders make of them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramerge.io._names import renamed
from loramerge.io._open import open_adapter
from tests.oracle.test_diffusers_converters import FLUX, RANK, Case, Tensors, names, pipeline
from tests.typed import typed

# Layers outside the blocks, which the files most people have do not adapt.
ENDS = (
    *("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer", "lora_te"),
    *("text_encoders", "embed", "head", "time_", "adaLN", "vace", "img_emb", "modulation"),
    *("pos_", "norm_out", "proj_out", "cap_"),
)
MIXINS = {
    "Flux": "Flux",
    "Flux.2": "Flux2",
    "HunyuanVideo": "HunyuanVideo",
    "Qwen-Image": "QwenImage",
    "Stable Diffusion 3": "SD3",
    "Wan": "Wan",
    "Z-Image": "ZImage",
}
WIDTHS = {"Flux": FLUX, "HunyuanVideo": FLUX}
DOWN, A = ("lora_down", "lora_up"), ("lora_A", "lora_B")
SPELLINGS = [("kohya", DOWN), ("comfy", DOWN), ("comfy", A)]


def file_of(case: Case, path: Path) -> Path:
    """An adapter of every layer in the blocks."""
    tensors: Tensors = {}
    for name, row in names(case):
        rows = sum(row.shares) * case.width if row.shares else 2 * case.width
        tensors[f"{name}.{case.ends[0]}.weight"] = torch.randn(RANK, case.width)
        tensors[f"{name}.{case.ends[1]}.weight"] = torch.randn(rows, RANK)
        if case.alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(case.alpha)
    save_file(tensors, path, {"modelspec.architecture": case.family})
    return path


def loads_all(case: Case, path: Path) -> bool:
    """Whether diffusers finds a place for every layer, by the names its model has for them."""
    try:
        found = case.convert(dict(load_file(path)))
    except (KeyError, RuntimeError, ValueError):
        return False
    wanted = renamed(open_adapter(str(path)), "diffusers").modules
    ends = (".lora_A.weight", ".lora_B.weight")
    return set(found) == {name + end for name in wanted for end in ends}


@pytest.mark.parametrize("alpha", [1.0, None], ids=["alpha", "none"])
@pytest.mark.parametrize(("naming", "ends"), SPELLINGS, ids=["kohya", "comfy-down", "comfy-A"])
@pytest.mark.parametrize("family", MIXINS)
def test_verify_says_right_where_diffusers_loads_every_layer(
    family: str, naming: str, ends: tuple[str, str], alpha: float | None, tmp_path: Path
) -> None:
    width = WIDTHS.get(family, 4)
    case = Case(family, naming, pipeline(MIXINS[family]), ends, alpha, width, ENDS)
    path = file_of(case, tmp_path / "a.safetensors")
    done = typed("verify", path, "--for", "diffusers")
    assert (done.code == 0) == loads_all(case, path), done.out


@pytest.mark.parametrize("family", MIXINS)
def test_what_verify_says_to_type_is_right(family: str, tmp_path: Path) -> None:
    ends, width = (A if family == "Flux" else DOWN), WIDTHS.get(family, 4)
    case = Case(family, "comfy", pipeline(MIXINS[family]), ends, None, width, ENDS)
    path = file_of(case, tmp_path / "a.safetensors")
    assert typed("convert", path, "--to", "diffusers", "-o", tmp_path / "b").code == 0
    done = typed("verify", tmp_path / "b", "--for", "diffusers", "--against", path)
    assert done.code == 0, done.out + done.err
