"""Adapters published by others, as they are: every one is read."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from loramerge.io._open import open_adapter
from tests.typed import SHARED, typed

pytestmark = pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs the real adapters of ../shared/adapters"
)
READ = {
    "gpt2-legal": (36, 8, "gpt2"),
    "gpt2-medical": (36, 8, "gpt2"),
    "gpt2-sports": (36, 8, "gpt2"),
    "gptneo-movies": (24, 8, "EleutherAI/gpt-neo-125M"),
    "privacyfilter-zh-mts": (32, 16, "openai/privacy-filter"),
}
# Files of layouts that store no module paths, or none of PEFT's: layout, modules, rank, scaling.
OTHERS = {
    "cloneofsimo-analog-r4-fp16/analog_svd_rank4.safetensors": ("cloneofsimo", 192, 4, 1.0),
    "cloneofsimo-disney-inpaint-mixed-dtype/lora_disney_inpainting.safetensors": (
        *("cloneofsimo", 192, 1, 1.0),
    ),
    "cloneofsimo-disney-r1-ti/lora_disney.safetensors": ("cloneofsimo", 192, 1, 1.0),
    "mlx-qwen05b-it100/0000100_adapters.safetensors": ("mlx", 8, 8, 10.0),
    "mlx-qwen05b-it200/0000200_adapters.safetensors": ("mlx", 8, 8, 10.0),
    "mlx-qwen05b-it200/adapters.safetensors": ("mlx", 8, 8, 10.0),
    "samvit-r16/lora_rank16.safetensors": ("sam", 24, 16, 1.0),
    "samvit-r2/lora_rank2.safetensors": ("sam", 24, 2, 1.0),
    "samvit-r4-zeroB/lora.safetensors": ("sam", 24, 4, 1.0),
    "samvit-r4/lora_rank4.safetensors": ("sam", 24, 4, 1.0),
    "samvit-r6/lora_rank6.safetensors": ("sam", 24, 6, 1.0),
    "samvit-r8/lora_rank8.safetensors": ("sam", 24, 8, 1.0),
}


def test_every_file_is_read_here() -> None:
    found = {str(path.relative_to(SHARED)) for path in SHARED.rglob("*.safetensors")}
    assert found == {f"{name}/adapter_model.safetensors" for name in READ} | set(OTHERS)


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("file", ["", "adapter_model.safetensors"], ids=["directory", "file"])
def test_published_peft_adapters_are_read(name: str, file: str) -> None:
    modules, rank, base = READ[name]
    adapter = open_adapter(str(SHARED / name / file))
    assert len(adapter.modules) == modules
    assert {(m.rank, m.scaling, m.kind) for m in adapter.modules.values()} == {
        (rank, 2.0, "linear")
    }
    assert adapter.base_model == base
    assert (adapter.variants, adapter.assumed) == ((), ())


@pytest.mark.parametrize("name", READ)
def test_their_updates_are_the_products_of_the_stored_factors(name: str) -> None:
    adapter = open_adapter(str(SHARED / name))
    stored = load_file(SHARED / name / "adapter_model.safetensors")
    for path in adapter.modules:
        A, B = (
            stored[f"base_model.model.{path}.lora_{letter}.weight"].double().numpy()
            for letter in "AB"
        )
        update = adapter.read(path)
        np.testing.assert_array_equal(update.A, A)
        np.testing.assert_array_equal(update.B, 2.0 * B)  # exact: a power of two


def test_a_conv1d_adapter_says_so() -> None:
    assert open_adapter(str(SHARED / "gpt2-legal")).config["fan_in_fan_out"] is True


def test_a_published_head_is_carried_unchanged_by_squeeze(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = typed("squeeze", SHARED / "privacyfilter-zh-mts", "-r", "4", "-o", out)
    assert done.code == 0, done.err
    assert "carried unchanged" in done.err
    before = load_file(SHARED / "privacyfilter-zh-mts" / "adapter_model.safetensors")
    after = load_file(out / "adapter_model.safetensors")
    for end in ("weight", "bias"):
        key = f"base_model.model.score.{end}"
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=0)


@pytest.mark.parametrize("file", OTHERS)
def test_published_files_of_other_layouts_are_read(file: str) -> None:
    layout, modules, rank, scaling = OTHERS[file]
    adapter = open_adapter(str(SHARED / file))
    assert adapter.layout == layout
    assert len(adapter.modules) == modules
    assert {(m.rank, m.scaling) for m in adapter.modules.values()} == {(rank, scaling)}


@pytest.mark.parametrize("folder", sorted({file.partition("/")[0] for file in OTHERS}))
def test_so_are_their_directories(folder: str) -> None:
    assert open_adapter(str(SHARED / folder)).layout in {layout for layout, *_ in OTHERS.values()}


# PEFT 0.21 asks transformers 5 by an old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_sees_the_same_update_of_a_published_adapter() -> None:
    from peft import PeftModel
    from transformers import GPT2Config, GPT2LMHeadModel

    # GPT-2's own shapes with a small vocabulary, which no target module depends on.
    base = GPT2LMHeadModel(GPT2Config(vocab_size=16, bos_token_id=0, eos_token_id=0))
    model = PeftModel.from_pretrained(base, SHARED / "gpt2-legal")
    adapter = open_adapter(str(SHARED / "gpt2-legal"))
    seen = 0
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            update = adapter.read(name)
            theirs = layer.get_delta_weight("default").T  # Conv1D keeps its weight transposed
            # float32 products of inner dimension 8, added up in another order.
            np.testing.assert_allclose(
                update.B @ update.A, theirs.detach().numpy(), rtol=1e-5, atol=1e-8
            )
            seen += 1
    assert seen == len(adapter.modules)
