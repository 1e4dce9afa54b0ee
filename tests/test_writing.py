"""Writing: the bytes the safetensors library would write, in any order, whatever is carried."""

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save

from loramerge.io._layout import Stored, Written
from loramerge.io._open import open_adapter
from loramerge.io._write import TensorWriter, file_size, start_file
from tests.build import PREFIX, write_peft
from tests.typed import typed

DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
TENSORS = {
    f"{letter}.{name}": torch.arange(size).to(dtype)
    for name, dtype in DTYPES.items()
    for letter, size in (("b", 3), ("a", 5), ("é", 1))
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def written(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Written:
    stored = [
        Stored(key, NAMES[tensor.dtype], tuple(tensor.shape)) for key, tensor in tensors.items()
    ]
    return Written(tuple(stored), metadata or {})


def filled(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """The file our writer makes of tensors, put down last first."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    writer = start_file(descriptor, written(tensors, metadata))
    for key in reversed(tensors):
        writer.write(key, raw(tensors[key]))
    os.close(descriptor)
    return path.read_bytes()


def test_bytes_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    # One metadata key: the library writes more of them in another order every time.
    ours = filled(tmp_path / "x.safetensors", TENSORS, {"format": "pt"})
    theirs = save(TENSORS, {"format": "pt"})
    assert ours == theirs


def test_every_tensor_is_aligned_to_its_own_size(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    writer = start_file(descriptor, written(TENSORS, {"a": "1", "b": "22"}))
    os.close(descriptor)
    assert writer.data_start % 8 == 0
    for key, (start, _) in writer.offsets.items():
        assert start % TENSORS[key].element_size() == 0


def test_the_library_reads_every_tensor_and_the_metadata_back(tmp_path: Path) -> None:
    metadata = {"b": "2", "a": "1", "text": "é\n\"'"}
    filled(tmp_path / "x.safetensors", TENSORS, metadata)
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert opened.metadata() == metadata
        for key, tensor in TENSORS.items():
            torch.testing.assert_close(opened.get_tensor(key), tensor, rtol=0, atol=0)


def test_neither_the_order_of_tensors_nor_that_of_metadata_changes_a_byte(tmp_path: Path) -> None:
    metadata = {"b": "2", "a": "1", "c": "3"}
    one = filled(tmp_path / "1.safetensors", TENSORS, metadata)
    turned = dict(reversed(TENSORS.items()))
    two = filled(tmp_path / "2.safetensors", turned, dict(reversed(metadata.items())))
    assert one == two


def test_the_size_is_known_before_anything_is_written(tmp_path: Path) -> None:
    content = filled(tmp_path / "x.safetensors", TENSORS, {"format": "pt"})
    assert file_size(written(TENSORS, {"format": "pt"})) == len(content)


def test_text_that_is_none_keeps_the_file_readable(tmp_path: Path) -> None:
    filled(tmp_path / "x.safetensors", TENSORS, {"path": "\udcff-odd"})
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert opened.metadata() == {"path": "?-odd"}


def test_a_write_that_the_system_splits_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = filled(tmp_path / "1.safetensors", TENSORS, {"format": "pt"})
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:5], at))
    assert filled(tmp_path / "2.safetensors", TENSORS, {"format": "pt"}) == whole


@pytest.mark.parametrize("data", [b"", b"12345"])
def test_a_tensor_of_the_wrong_length_is_our_own_mistake(data: bytes) -> None:
    with pytest.raises(AssertionError, match="bytes for 4"):
        TensorWriter(0, Written(()), 0, {"a": (0, 4)}).write("a", data)


def test_metadata_can_be_stated_again_once_all_is_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    whole = filled(path, TENSORS, {"a": "1", "hash": "ff"})
    descriptor = os.open(tmp_path / "y.safetensors", os.O_RDWR | os.O_CREAT)
    writer = start_file(descriptor, written(TENSORS, {"a": "1", "hash": "00"}))
    for key, tensor in TENSORS.items():
        writer.write(key, raw(tensor))
    writer.restate({"hash": "ff"})
    os.close(descriptor)
    assert (tmp_path / "y.safetensors").read_bytes() == whole


def test_a_header_that_grew_is_our_own_mistake(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "x.safetensors", os.O_RDWR | os.O_CREAT)
    writer = start_file(descriptor, written(TENSORS, {"hash": "00"}))
    with pytest.raises(AssertionError, match="a header of"):
        writer.restate({"hash": "0123456789"})
    os.close(descriptor)


def test_a_key_written_twice_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="a is written twice"):
        file_size(Written((Stored("a", "F32", (1,)), Stored("a", "F32", (2,)))))


def test_what_is_carried_is_written_under_the_key_peft_looks_for(tmp_path: Path) -> None:
    pair = np.ones((2, 6), np.float32), np.ones((4, 2), np.float32)
    head = {f"module.{PREFIX}score.weight": np.arange(6, dtype=np.float32)}
    write_peft(tmp_path / "a.safetensors", {"lin": pair}, extras=head)
    done = typed("squeeze", tmp_path / "a.safetensors", "-r", "1", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    adapter = open_adapter(str(tmp_path / "out"))
    assert [extra.key for extra in adapter.extras] == [f"{PREFIX}score.weight"]
    assert adapter.config["modules_to_save"] == ["score"]


def test_a_bare_result_says_in_its_header_what_it_carries(tmp_path: Path) -> None:
    pair = np.ones((2, 6), np.float32), np.ones((4, 2), np.float32)
    head = {f"{PREFIX}score.weight": np.arange(6, dtype=np.float32)}
    write_peft(tmp_path / "a", {"lin": pair}, extras=head, modules_to_save=["score"])
    out = tmp_path / "out.safetensors"
    assert typed("squeeze", tmp_path / "a", "-r", "1", "-o", out).code == 0
    assert open_adapter(str(out)).config["modules_to_save"] == ["score"]
    assert typed("squeeze", out, "-r", "1", "-o", tmp_path / "again").code == 0
    assert open_adapter(str(tmp_path / "again")).config["modules_to_save"] == ["score"]


class Tiny(torch.nn.Module):
    """Something to adapt, with a head and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(10, 6)
        self.lin = torch.nn.Linear(6, 4)
        self.score = torch.nn.Linear(4, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Scores of token ids."""
        return self.score(torch.tanh(self.lin(self.embed(ids))))


@pytest.mark.parametrize(
    "config",
    [
        {"modules_to_save": ["score"]},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"trainable_token_indices": {"embed": [1, 2]}},
        {"target_modules": ["lin", "embed"]},
    ],
    ids=["head", "biases", "one bias", "token rows", "embedding"],
)
def test_peft_computes_the_same_from_what_is_carried(
    config: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    base, ids = Tiny(), torch.arange(10)
    facts = {"r": 2, "lora_alpha": 6, "target_modules": ["lin"], "init_lora_weights": False}
    trained = get_peft_model(copy.deepcopy(base), LoraConfig(**{**facts, **config}))
    for parameter in trained.parameters():
        if parameter.requires_grad:  # what training changes, and PEFT therefore saves
            torch.nn.init.normal_(parameter)
    trained.save_pretrained(tmp_path / "a")
    # All of its rank is kept, so nothing changes but the scale, which is folded in.
    assert typed("squeeze", tmp_path / "a", "-r", "2", "-o", tmp_path / "out").code == 0
    ours = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out")
    # float32 factors, multiplied once more than before.
    torch.testing.assert_close(ours(ids), trained(ids), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(base(ids), trained(ids), atol=1e-2)
