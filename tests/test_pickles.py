"""Pickles (.bin, .pt): refused unless allowed; then read as tensors, and nothing of them is run."""

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import loramerge
from loramerge.errors import AdapterError
from loramerge.io._open import open_adapter
from loramerge.io._pickle import open_pickle
from tests.build import write_peft
from tests.typed import typed

STEM = "base_model.model.x.q"
rng = np.random.default_rng(3)


def factors() -> dict[str, torch.Tensor]:
    return {
        f"{STEM}.lora_A.weight": torch.tensor(rng.standard_normal((2, 6)), dtype=torch.bfloat16),
        f"{STEM}.lora_B.weight": torch.tensor(rng.standard_normal((4, 2)), dtype=torch.float32),
    }


def directory(path: Path, tensors: object, name: str = "adapter_model.bin") -> Path:
    path.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}
    (path / "adapter_config.json").write_text(json.dumps(config))
    torch.save(tensors, path / name)
    return path


def test_a_pickle_is_refused_in_one_sentence_that_names_the_flag(tmp_path: Path) -> None:
    folder = directory(tmp_path / "a", factors())
    for reference in (folder, folder / "adapter_model.bin"):
        with pytest.raises(AdapterError, match=r"is a pickle \(\.bin\)") as refused:
            open_adapter(str(reference))
        assert refused.value.hint == "--allow-pickle reads the tensors in it and runs nothing"


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_an_allowed_pickle_reads_as_the_tensors_that_were_saved(name: str, tmp_path: Path) -> None:
    stored = factors()
    folder = directory(tmp_path / "a", stored, name)
    adapter = open_adapter(str(folder), allow_pickle=True)
    assert (adapter.layout, adapter.modules["x.q"].scaling) == ("peft", 3.0)
    update = adapter.read("x.q")
    np.testing.assert_array_equal(update.A, stored[f"{STEM}.lora_A.weight"].float().numpy())
    np.testing.assert_array_equal(update.B, 3 * stored[f"{STEM}.lora_B.weight"].numpy())


def test_views_are_read_as_their_own_numbers(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    stored = {f"{STEM}.lora_A.weight": whole[1:3], f"{STEM}.lora_B.weight": whole[:2].T[2:6]}
    source = open_pickle(directory(tmp_path / "a", stored) / "adapter_model.bin")
    for key, tensor in stored.items():
        np.testing.assert_array_equal(source.array(key), tensor.numpy())


def test_hashing_covers_the_bytes_of_the_file(tmp_path: Path) -> None:
    path = directory(tmp_path / "a", factors()) / "adapter_model.bin"
    assert b"".join(open_pickle(path).chunks()) == path.read_bytes()


def test_safetensors_count_where_both_are_there(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "a", {"x.v": (np.ones((2, 6)), np.ones((4, 2)))})
    torch.save(factors(), folder / "adapter_model.bin")
    assert list(open_adapter(str(folder), allow_pickle=True).modules) == ["x.v"]


def test_cuda_tensors_are_read_without_cuda(tmp_path: Path) -> None:
    path = directory(tmp_path / "a", factors()) / "adapter_model.bin"
    # As torch writes tensors of a GPU: the device is a word in the pickle.
    with zipfile.ZipFile(path) as file:
        entries = {info.filename: file.read(info) for info in file.infolist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in entries.items():
            device = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            file.writestr(name, device if name.endswith("data.pkl") else data)
    assert b"cuda:0" in path.read_bytes()
    assert open_adapter(str(path), allow_pickle=True).read("x.q").rank == 2


class Runs:
    """What a pickle can make of opening it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (self.path,))


def test_nothing_in_it_is_run(tmp_path: Path) -> None:
    folder = directory(tmp_path / "a", {**factors(), "x": Runs(tmp_path / "ran")})
    with pytest.raises(AdapterError, match="holds more than tensors, or is damaged; torch says"):
        open_adapter(str(folder), allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def packed(path: Path) -> None:
    tensors = {f"{STEM}.lora_A.weight": torch.zeros(1000, 1000)}
    torch.save(tensors, path)
    with zipfile.ZipFile(path) as file:
        entries = {info.filename: file.read(info) for info in file.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in entries.items():
            file.writestr(name, data)


def named_outside(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("../data.pkl", pickle.dumps({}))


def old(path: Path) -> None:
    torch.save(factors(), path, _use_new_zipfile_serialization=False)


def repeating(path: Path) -> None:
    torch.save({f"{STEM}.lora_A.weight": torch.zeros(1).expand(1 << 20, 1 << 10)}, path)


# What is in the file -> what is said of it.
REFUSED = {
    "is compressed .*data.pkl": packed,
    r"names its parts as no program does: \.\./data\.pkl": named_outside,
    "no zip of tensors, but a pickle of before": old,
    "lora_A.weight repeats numbers": repeating,
    "holds no tensors by name, but a list": lambda path: torch.save([torch.ones(2)], path),
    "holds more than tensors: epoch": lambda path: torch.save({**factors(), "epoch": 1}, path),
    "is no plain tensor": lambda path: torch.save({"x": torch.eye(3).to_sparse()}, path),
    "stores 'x' as complex64": lambda path: torch.save({"x": torch.ones(2) * 1j}, path),
    "holds 1 empty tensors": lambda path: torch.save({"x": torch.ones(0)}, path),
    "unusable tensor name": lambda path: torch.save({"x\n": torch.ones(1)}, path),
    "holds no tensors": lambda path: torch.save({}, path),
}


@pytest.mark.parametrize("sentence", REFUSED)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_pickle_that_is_no_adapter_has_its_own_sentence(sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.bin"
    REFUSED[sentence](path)
    with pytest.raises(AdapterError, match=sentence) as refused:
        open_adapter(str(path), allow_pickle=True)
    assert refused.value.hint


def test_the_state_of_a_training_run_is_never_opened(tmp_path: Path) -> None:
    path = tmp_path / "optimizer.pt"
    path.write_bytes(b"anything")
    with pytest.raises(AdapterError, match="state of a training run"):
        open_adapter(str(path), allow_pickle=True)


def test_a_zip_that_states_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    path = directory(tmp_path / "a", factors()) / "adapter_model.bin"
    data = bytearray(path.read_bytes())
    place = data.rindex(b"PK\x01\x02")  # the last entry of the directory: its size is at 24
    data[place + 20 : place + 28] = (1 << 30).to_bytes(4, "little") * 2
    path.write_bytes(data)
    with pytest.raises(AdapterError, match=r"states more bytes than its|no zip of tensors"):
        open_pickle(path)


@pytest.fixture
def pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return directory(tmp_path / "a", factors())


# Every command that reads adapters -> what is typed; a recipe is run from a file.
COMMANDS = {
    "inspect": ("inspect", "a"),
    "diff": ("diff", "a", "a"),
    "verify": ("verify", "a"),
    "convert": ("convert", "a", "--to", "mlx"),
    "squeeze": ("squeeze", "a", "--rank", "1"),
    "cluster": ("cluster", "a", "a", "-k", "2"),
    "split": ("split", "a", "--every", "1"),
    "compare": ("compare", "a", "a", "--methods", "cat"),
    "sweep": ("cluster", "a", "a", "--sweep-k", "1,2"),
    "run": ("run", "recipe.yaml"),
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_every_command_that_reads_takes_the_flag(words: tuple[str, ...], pickled: Path) -> None:
    Path("recipe.yaml").write_text("{method: cat, adapters: [a, a]}")
    refused = typed(*words)
    assert refused.code == 1
    assert "is a pickle (.bin)" in refused.err
    assert "--allow-pickle" in refused.err
    done = typed(*words, "--allow-pickle")
    assert done.code == 0, done.err


def test_a_result_made_of_pickles_is_reproduced_only_where_they_are_allowed(pickled: Path) -> None:
    assert typed("cat", "a", "a", "--allow-pickle", "-o", "out").code == 0
    assert typed("reproduce", "out").code == 1
    done = typed("reproduce", "out", "--allow-pickle")
    assert done.code == 0, done.err


def test_python_takes_it_too(pickled: Path) -> None:
    with pytest.raises(AdapterError):
        loramerge.load("a")
    assert loramerge.load("a", allow_pickle=True).layout == "peft"
