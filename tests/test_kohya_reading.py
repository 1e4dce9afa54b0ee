"""Reading and writing kohya's layout: an alpha and a rank per module in, one alpha out."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from loramerge.adapter import Adapter
from loramerge.errors import AdapterError, UsageError
from loramerge.io._open import open_adapter
from tests.build import write_kohya
from tests.typed import typed

FIXTURES = Path(__file__).parents[1] / "fixtures" / "kohya"
DOWN, UP = np.ones((4, 6), np.float32), np.ones((5, 4), np.float32)
QKV = "lora_unet_double_blocks_0_img_attn_qkv"


def opened(path: Path) -> Adapter:
    return open_adapter(str(path))


def stored(path: Path, alpha: torch.Tensor | None) -> Adapter:
    """A file of one rank-4 module with this very alpha tensor, or without one."""
    tensors = {
        "lora_unet_a.lora_down.weight": torch.ones(4, 6),
        "lora_unet_a.lora_up.weight": torch.ones(5, 4),
    }
    if alpha is not None:
        tensors["lora_unet_a.alpha"] = alpha
    save_file(tensors, path / "a.safetensors")
    return opened(path / "a.safetensors")


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32]
)
def test_the_scale_is_the_stored_alpha_over_the_rank(
    dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path
) -> None:
    adapter = stored(tmp_path, torch.full(shape, 2, dtype=dtype))
    assert adapter.modules["lora_unet_a"].scaling == 0.5
    assert not adapter.assumed


def test_a_rounded_alpha_is_taken_as_it_is_stored(tmp_path: Path) -> None:
    adapter = stored(tmp_path, torch.tensor(0.1, dtype=torch.bfloat16))
    assert adapter.modules["lora_unet_a"].scaling == 0.10009765625 / 4


@pytest.mark.parametrize("alpha", [None, torch.tensor(0.0), torch.tensor([0])])
def test_an_alpha_that_is_missing_or_zero_means_scale_one_and_is_said(
    alpha: torch.Tensor | None, tmp_path: Path
) -> None:
    adapter = stored(tmp_path, alpha)
    assert adapter.modules["lora_unet_a"].scaling == 1.0
    assert adapter.assumed == ("scale 1 where alpha is missing or 0, as in kohya: 1 of 1 modules",)
    assert not adapter.scale_assumed  # the layout defines it


def test_a_negative_alpha_turns_the_update_around(tmp_path: Path) -> None:
    assert stored(tmp_path, torch.tensor(-4.0)).modules["lora_unet_a"].scaling == -1.0


@pytest.mark.parametrize("alpha", [math.inf, -math.inf, math.nan])
def test_an_alpha_that_is_no_number_is_refused(alpha: float, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"lora_unet_a\.alpha is "):
        stored(tmp_path, torch.tensor(alpha))


def test_an_alpha_typed_by_the_user_is_refused_as_the_file_has_its_own(tmp_path: Path) -> None:
    path = write_kohya(tmp_path / "a.safetensors", {"lora_unet_a": (DOWN, UP, 2.0)})
    with pytest.raises(UsageError, match="holds an alpha for each module"):
        open_adapter(str(path), alpha=4)


def test_the_rank_of_the_file_counts_and_not_what_its_metadata_says(tmp_path: Path) -> None:
    path = write_kohya(
        tmp_path / "a.safetensors",
        {"lora_unet_a": (DOWN, UP, 2.0)},
        metadata={"ss_network_dim": "128", "ss_network_alpha": "64"},
    )
    module = opened(path).modules["lora_unet_a"]
    assert (module.rank, module.scaling) == (4, 0.5)


def test_split_qkv_has_the_rank_on_disk_and_the_block_structure_it_was_saved_with() -> None:
    adapter = opened(FIXTURES / "split_qkv.safetensors")
    module, update = adapter.modules[QKV], adapter.read(QKV)
    assert (module.rank, module.scaling) == (6, 2 / 6)
    for part in range(3):  # q, k and v: rank 2 each, alpha / 6 each
        rows, terms = slice(4 * part, 4 * part + 4), slice(2 * part, 2 * part + 2)
        np.testing.assert_array_equal(
            (update.B @ update.A)[rows], update.B[rows, terms] @ update.A[terms]
        )


@pytest.mark.parametrize("up", [(5, 4, 1, 1), (5, 4)])
def test_a_convolution_is_folded_over_its_kernel(up: tuple[int, ...], tmp_path: Path) -> None:
    down = np.arange(4 * 3 * 9, dtype=np.float32).reshape(4, 3, 3, 3)
    write_kohya(tmp_path / "a.safetensors", {"lora_unet_c": (down, np.ones(up, np.float32), 4.0)})
    adapter = opened(tmp_path / "a.safetensors")
    module, update = adapter.modules["lora_unet_c"], adapter.read("lora_unet_c")
    assert (module.kind, module.kernel, module.shape) == ("conv", (3, 3), (5, 27))
    dense = np.einsum("or,rikl->oikl", np.ones((5, 4)), down)
    np.testing.assert_array_equal(update.B @ update.A, dense.reshape(5, 27))


def test_dora_is_refused_by_its_name(tmp_path: Path) -> None:
    save_file(
        {
            "lora_unet_a.lora_down.weight": torch.ones(4, 6),
            "lora_unet_a.lora_up.weight": torch.ones(5, 4),
            "lora_unet_a.dora_scale": torch.ones(5, 1),
        },
        tmp_path / "a.safetensors",
    )
    done = typed("squeeze", tmp_path / "a.safetensors", "-r", "2", "-o", tmp_path / "out")
    assert done.code == 1
    assert "is DoRA (dora_scale): its magnitudes act on the sum" in done.err


def test_the_base_model_is_what_the_trainer_wrote(tmp_path: Path) -> None:
    assert opened(FIXTURES / "linear.safetensors").base_model == "sd_v1"


def merged(tmp_path: Path, *words: str) -> dict[str, torch.Tensor]:
    """Two kohya files of ranks 4 and 2 and different alphas as one, read by the library."""
    write_kohya(
        tmp_path / "a.safetensors",
        {"lora_unet_a": (DOWN, UP, 2.0), "lora_unet_b": (DOWN[:1], UP[:, :1], 8.0)},
        metadata={
            "ss_base_model_version": "sd_v1",
            "ss_output_name": "mine",
            "sshs_model_hash": "0",
        },
    )
    write_kohya(
        tmp_path / "b.safetensors",
        {"lora_unet_a": (DOWN[:2], UP[:, :2], 1.0)},
        metadata={"ss_base_model_version": "sd_v1", "ss_output_name": "yours"},
    )
    out = tmp_path / "out.safetensors"
    done = typed(
        "arithmetic", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "-o", out, *words
    )
    assert done.code == 0, done.err
    return load_file(out)


@pytest.mark.parametrize("words", [(), ("--layout", "pattern"), ("-r", "full")])
def test_results_have_one_alpha_for_all_modules(words: tuple[str, ...], tmp_path: Path) -> None:
    tensors = merged(tmp_path, *words)
    alphas = {tensor.item() for key, tensor in tensors.items() if key.endswith(".alpha")}
    ranks = [tensor.shape[0] for key, tensor in tensors.items() if "lora_down" in key]
    assert alphas == {max(ranks)}


@pytest.mark.parametrize("words", [(), ("--layout", "pattern")])
def test_results_are_the_dense_sum_as_any_reader_of_kohya_files_computes_it(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    tensors = merged(tmp_path, *words)
    ones = {"lora_unet_a": 4 * 2 / 4 + 2 * 1 / 2, "lora_unet_b": 8.0}
    for name, value in ones.items():
        down, up = (tensors[f"{name}.lora_{end}.weight"].double() for end in ("down", "up"))
        scale = tensors[f"{name}.alpha"].item() / down.shape[0]
        # float32 factors of a rank-1 sum of ones.
        torch.testing.assert_close(
            scale * up @ down, torch.full((5, 6), value).double(), rtol=1e-6, atol=1e-6
        )


def test_metadata_that_stays_true_is_kept_and_the_rest_is_not(tmp_path: Path) -> None:
    merged(tmp_path)
    metadata = opened(tmp_path / "out.safetensors").source.metadata
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "4")
    assert "ss_output_name" not in metadata


def test_a_result_in_kohyas_layout_is_one_file_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_kohya(tmp_path / "a.safetensors", {"lora_unet_a": (DOWN, UP, 2.0)})
    done = typed("squeeze", "a.safetensors", "-r", "2")
    assert (done.code, done.out) == (0, "a-r2.safetensors\n")
