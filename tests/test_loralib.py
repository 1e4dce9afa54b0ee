"""loralib's state dicts, against what its layers compute."""

from pathlib import Path

import numpy as np
import pytest
import torch

from loramerge.errors import AdapterError
from loramerge.io._open import open_adapter
from tests.build import save
from tests.test_fused import delta

NAME = "transformer.h.0.attn.c_attn"
draw = np.random.default_rng(17)


def stored(path: Path, parts: int, rank: int = 2, width: int = 5, rows: int = 4) -> dict:
    """A MergedLinear of so many parts, as lora_state_dict saves it."""
    tensors = {
        f"{NAME}.lora_A": draw.standard_normal((rank * parts, width)).astype("f4"),
        f"{NAME}.lora_B": draw.standard_normal((rows * parts, rank)).astype("f4"),
    }
    save(path, tensors, "float32")
    return tensors


@pytest.mark.parametrize("parts", [1, 3])
def test_the_update_is_that_of_the_grouped_convolution(parts: int, tmp_path: Path) -> None:
    tensors = stored(tmp_path / "a.safetensors", parts)
    A, B = (torch.tensor(x, dtype=torch.float64) for x in tensors.values())
    # loralib computes it so (layers.py, merge_AB), and multiplies by alpha / r.
    theirs = torch.nn.functional.conv1d(A[None], B[..., None], groups=parts)[0]
    adapter = open_adapter(str(tmp_path / "a.safetensors"), 8.0)
    assert (adapter.layout, adapter.modules[NAME].scaling) == ("loralib", 4.0)
    # B is scaled by a power of two: exact but for the sums.
    np.testing.assert_allclose(delta(adapter, NAME), 4 * theirs.numpy(), rtol=1e-12)


def test_two_parts_of_a_fused_layer_are_refused_as_nothing_says_which(tmp_path: Path) -> None:
    stored(tmp_path / "a.safetensors", 2)
    with pytest.raises(AdapterError, match="adapt two parts of a fused layer"):
        open_adapter(str(tmp_path / "a.safetensors"))


def test_without_an_alpha_the_scale_is_said_to_be_assumed(tmp_path: Path) -> None:
    stored(tmp_path / "a.safetensors", 1)
    adapter = open_adapter(str(tmp_path / "a.safetensors"))
    assert adapter.scale_assumed
    assert adapter.modules[NAME].scaling == 1
