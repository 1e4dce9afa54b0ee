"""Pulling: an adapter as it is, with what describes it, all or nothing."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.build import write_kohya
from tests.conftest import factors
from tests.hub.store import Hub
from tests.typed import tree, typed

DESCRIBING = {"LICENSE": b"terms", "loramerge.json": b"{}", "tokenizer.json": b'{"a": 1}'}
REST = {**DESCRIBING, "optimizer.pt": b"x", "sub/a.txt": b"y"}


def test_a_pulled_directory_holds_the_files_that_describe_the_adapter_and_no_others(
    hub: Hub, adapter: dict[str, bytes], here: Path
) -> None:
    hub.create("me/x", {**adapter, **REST})
    done = typed("pull", "me/x@main")
    assert (done.code, done.out, done.err) == (0, "x\n", "")
    expected = {**adapter, **DESCRIBING}
    assert {path.name: path.read_bytes() for path in Path("x").iterdir()} == expected
    assert not [path for path in Path("x").iterdir() if path.is_symlink()]


def test_a_folder_is_pulled_under_its_own_name_or_the_one_that_is_asked_for(
    hub: Hub, adapter: dict[str, bytes], here: Path
) -> None:
    hub.create("me/x", {f"checkpoint-10/{name}": data for name, data in adapter.items()})
    assert typed("pull", "me/x:checkpoint-10").out == "checkpoint-10\n"
    assert typed("pull", "me/x:checkpoint-10", "-o", "new/y", "-q").out == "new/y\n"
    assert typed("diff", "checkpoint-10", "new/y", "--fail-above", "0").code == 0


@pytest.mark.parametrize(
    ("stored", "pulled"),
    [("v1.safetensors", "v1.safetensors"), ("pytorch_lora_weights.safetensors", "k.safetensors")],
)
def test_a_file_without_a_config_stays_one_file(
    stored: str, pulled: str, hub: Hub, tmp_path: Path, here: Path, rng: np.random.Generator
) -> None:
    pair = factors(rng, 4)["layers.0.q_proj"]
    file = write_kohya(tmp_path / "k.safetensors", {"lora_unet_a": (*pair, 8.0)})
    hub.create("me/k", {stored: file.read_bytes(), "README.md": b"# K"})
    assert typed("pull", "me/k").out == f"{pulled}\n"
    assert load_file(pulled).keys() == load_file(file).keys()
    assert typed("pull", "me/k", "-o", "dir").out == "dir\n"
    assert tree(Path("dir")) == ["README.md", stored]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("pull me/x", 1, "x exists"),
        ("pull me/x -o y.safetensors", 2, "is more than one file"),
        ("pull ./x", 2, "./x is no reference to the Hub"),
        ("pull me/none", 1, "nor a repository on the Hub"),
    ],
)
def test_what_cannot_be_pulled_leaves_everything_as_it_was(
    words: str, code: int, said: str, hub: Hub, adapter: dict[str, bytes], here: Path
) -> None:
    hub.create("me/x", adapter)
    Path("x").mkdir()
    done = typed(*words.split())
    assert (done.code, done.out, len(done.lines)) == (code, "", 2)
    assert said in done.lines[0]
    assert tree(here) == ["x"]
    assert not hub.asked("/cdn/")


def test_a_broken_file_is_not_put_into_place(
    hub: Hub, adapter: dict[str, bytes], here: Path
) -> None:
    cut = adapter["adapter_model.safetensors"][:-10]
    hub.create("me/x", {**adapter, "adapter_model.safetensors": cut})
    done = typed("pull", "me/x")
    assert (done.code, "is truncated: 10 of" in done.err) == (1, True)
    assert tree(here) == []


def test_a_pickle_is_not_pulled_but_made_a_safetensors_file(
    hub: Hub, adapter: dict[str, bytes], here: Path
) -> None:
    import torch
    from safetensors.torch import load

    pickled = BytesIO()
    torch.save(load(adapter.pop("adapter_model.safetensors")), pickled)
    hub.create("me/x", {**adapter, "adapter_model.bin": pickled.getvalue()})
    done = typed("pull", "me/x@main")
    assert (done.code, done.lines) == (
        1,
        [
            "error: me/x@main:adapter_model.bin is a pickle; a safetensors file is all that is "
            "pulled.",
            "hint: make one of it: loramerge convert me/x@main --to peft --allow-pickle",
        ],
    )
    words = done.lines[1].partition(" loramerge ")[2].split()
    assert typed(*words, "-o", "made").code == 0
    assert (here / "made" / "adapter_model.safetensors").is_file()
