"""Reading PEFT's layout: which keys mean what, where the files are."""

import errno
import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from loramerge.adapter import Adapter
from loramerge.errors import AdapterError
from loramerge.io._open import open_adapter
from tests.build import PREFIX, write_peft
from tests.typed import typed

A, B = np.ones((2, 6), np.float32), np.ones((4, 2), np.float32)
PLAIN = {"layers.0.q_proj": (A, B), "layers.1.q_proj": (A, B)}


def scalings(adapter: Adapter) -> dict[str, float]:
    return {name: module.scaling for name, module in adapter.modules.items()}


def opened(path: Path, alpha: float | None = None) -> Adapter:
    return open_adapter(str(path), alpha)


def refusal(path: Path) -> AdapterError:
    with pytest.raises(AdapterError) as refused:
        opened(path)
    return refused.value


def test_base_model_and_fan_in_fan_out_are_kept(tmp_path: Path) -> None:
    path = write_peft(tmp_path / "a", PLAIN, base_model_name_or_path="gpt2", fan_in_fan_out=True)
    adapter = opened(path)
    assert adapter.base_model == "gpt2"
    assert adapter.config["fan_in_fan_out"] is True


def test_a_base_model_that_is_no_text_is_none(tmp_path: Path) -> None:
    adapter = opened(write_peft(tmp_path / "a", PLAIN, base_model_name_or_path=["gpt2"]))
    assert adapter.base_model is None


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "base_model.model.",
        "module.base_model.model.",
        "_orig_mod.base_model.model.",
        "_orig_mod.module.base_model.model.",
        "base_model.model._orig_mod.",
        "base_model.model._fsdp_wrapped_module.",
        "_fsdp_wrapped_module.base_model.model._checkpoint_wrapped_module.",
    ],
)
@pytest.mark.parametrize("label", ["", ".default", ".my-adapter"])
def test_wrappers_and_adapter_names_are_no_part_of_a_module_path(
    prefix: str, label: str, tmp_path: Path
) -> None:
    stem = f"{prefix}model.layers.0.q_proj"
    keys = {f"{stem}.lora_A{label}.weight": A, f"{stem}.lora_B{label}.weight": B}
    save_file(keys, tmp_path / "a.safetensors")
    assert list(opened(tmp_path / "a.safetensors").modules) == ["model.layers.0.q_proj"]


def test_a_module_named_module_keeps_its_name(tmp_path: Path) -> None:
    adapter = opened(write_peft(tmp_path / "a", {"encoder.module.lin": (A, B)}))
    assert list(adapter.modules) == ["encoder.module.lin"]


@pytest.mark.parametrize("label", ["", ".default"])
def test_an_embedding_is_folded_to_out_times_vocabulary(label: str, tmp_path: Path) -> None:
    keys = {
        f"{PREFIX}embed.lora_embedding_A{label}": np.ones((2, 30), np.float32),
        f"{PREFIX}embed.lora_embedding_B{label}": np.ones((4, 2), np.float32),
    }
    save_file(keys, tmp_path / "a.safetensors")
    module = opened(tmp_path / "a.safetensors").modules["embed"]
    assert (module.kind, module.shape, module.rank) == ("embedding", (4, 30), 2)


@pytest.mark.parametrize(
    "kernel", [(1,), (3,), (1, 1), (3, 3), (3, 1), (1, 1, 1), (2, 3, 3)], ids=str
)
def test_a_convolution_is_folded_over_its_kernel(kernel: tuple[int, ...], tmp_path: Path) -> None:
    factor_a = np.arange(2 * 3 * math.prod(kernel), dtype=np.float32).reshape(2, 3, *kernel)
    factor_b = np.arange(8, dtype=np.float32).reshape(4, 2, *(1 for _ in kernel))
    adapter = opened(write_peft(tmp_path / "a", {"conv": (factor_a, factor_b)}))
    module, update = adapter.modules["conv"], adapter.read("conv")
    assert (module.kind, module.kernel) == ("conv", kernel)
    dense = np.einsum("or,ri...->oi...", factor_b.reshape(4, 2), factor_a)
    np.testing.assert_array_equal(update.B @ update.A, dense.reshape(4, -1))


def test_two_dtypes_in_one_module_are_one_float32_module(tmp_path: Path) -> None:
    keys = {f"{PREFIX}q.lora_A.weight": A.astype(np.float16), f"{PREFIX}q.lora_B.weight": B}
    save_file(keys, tmp_path / "a.safetensors")
    assert opened(tmp_path / "a.safetensors").dtypes == ("F32",)


def test_all_zero_updates_are_read(tmp_path: Path) -> None:
    adapter = opened(write_peft(tmp_path / "a", {"q": (A, np.zeros_like(B))}))
    assert not adapter.read("q").B.any()


def test_a_rank_beyond_any_lora_is_refused(tmp_path: Path) -> None:
    long = np.zeros((65537, 1), np.float16)
    path = write_peft(tmp_path / "a", {"q": (long, long.T)}, dtype="float16")
    assert "has rank 65,537; the limit is 65,536" in refusal(path).message


def test_a_missing_path_says_where_to_look(tmp_path: Path) -> None:
    error = refusal(tmp_path / "no" / "a.safetensors")
    assert "does not exist" in error.message
    assert error.hint == f"see what is there: ls {tmp_path / 'no'}"


def test_a_path_that_may_be_one_in_a_repository_gets_the_reference_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hint = "if it is on the Hub, type: someone/lora:sub/x.safetensors"
    assert refusal(Path("someone/lora/sub/x.safetensors")).hint == hint


def test_a_directory_of_directories_names_one_that_holds_an_adapter(tmp_path: Path) -> None:
    write_peft(tmp_path / "run" / "checkpoint-10", PLAIN)
    assert refusal(tmp_path / "run").hint == (
        f"name the directory that does, for example: {tmp_path / 'run' / 'checkpoint-10'}"
    )


def test_the_usual_name_is_taken_where_a_directory_holds_more(tmp_path: Path) -> None:
    path = write_peft(tmp_path / "a", PLAIN)
    write_peft(path / "copy of adapter_model.safetensors", PLAIN)
    assert opened(path).source.path == path / "adapter_model.safetensors"


def test_the_only_file_of_a_directory_is_taken_whatever_its_name(tmp_path: Path) -> None:
    said = {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 6})}
    write_peft(tmp_path / "a" / "mine.safetensors", PLAIN, metadata=said)
    assert set(scalings(opened(tmp_path / "a")).values()) == {3.0}


def test_a_config_too_large_to_be_one_is_refused(tmp_path: Path) -> None:
    path = write_peft(tmp_path / "a", PLAIN, note="x" * 1_000_001)
    assert "adapter_config.json is larger than 1,000,000 bytes" in refusal(path).message


def test_what_may_not_be_read_is_said_in_the_systems_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(self: Path, mode: str) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    path = write_peft(tmp_path / "a", PLAIN)
    monkeypatch.setattr(Path, "open", refusing)  # root may read anything, and may run this
    error = refusal(path)
    assert "adapter_config.json cannot be read: Permission denied." in error.message
    assert error.hint == "check its path and permissions"


def test_a_path_no_system_can_have_is_refused() -> None:
    assert "cannot be read: File name too long." in refusal(Path("x" * 5000)).message


def single(path: Path, **config: str) -> Path:
    """One file that was made of an adapter with this config."""
    source, file = write_peft(path, PLAIN, **config), path.with_suffix(".safetensors")
    assert typed("cat", source, "-o", file).code == 0
    return file


def test_one_file_says_what_it_is_for(tmp_path: Path) -> None:
    said = {"base_model_name_or_path": "org/base", "revision": "v2", "task_type": "CAUSAL_LM"}
    file = single(tmp_path / "a", **said)
    assert opened(file).base_model == "org/base"
    assert typed("convert", file, "--to", "peft", "-o", tmp_path / "b").code == 0
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert {name: config[name] for name in said} == said


def test_of_files_for_different_models_is_said_that_they_are(tmp_path: Path) -> None:
    files = [single(tmp_path / n, base_model_name_or_path=f"org/{n}") for n in ("x", "y")]
    done = typed("cat", *files, "-o", tmp_path / "out")
    assert "the adapters name different base models: org/x, org/y" in done.err


def test_one_file_does_not_say_where_its_model_was(tmp_path: Path) -> None:
    file = single(tmp_path / "a", base_model_name_or_path="/home/me/base", revision="v2")
    assert opened(file).base_model is None
    assert b"/home/me" not in file.read_bytes()
    assert "revision" not in opened(file).config
