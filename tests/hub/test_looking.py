"""Looking at adapters on the Hub: three requests, one commit, no tensors."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

import loramerge as lm
from loramerge.io import _hub
from tests.build import write_kohya, write_peft
from tests.conftest import factors
from tests.hub.conftest import files
from tests.hub.store import Hub
from tests.typed import typed


def header_end(weights: bytes) -> int:
    """Where the tensors of a safetensors file begin."""
    return 8 + struct.unpack("<Q", weights[:8])[0]


@pytest.fixture
def large(tmp_path: Path, rng: np.random.Generator) -> dict[str, bytes]:
    """The files of an adapter whose weights are much larger than what a look may ask for."""
    pair = rng.standard_normal((512, 2048)), rng.standard_normal((2048, 512))
    return files(write_peft(tmp_path / "large", {"layers.0.up_proj": pair}))


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "me/x"),
        ("squeeze", "me/x", "-r", "2", "--dry-run"),
        ("arithmetic", "me/x", "-r", "2", "--dry-run"),
        ("run", "r.yaml", "--dry-run"),
    ],
)
def test_a_look_takes_three_requests_and_no_tensor(
    words: tuple[str, ...],
    hub: Hub,
    large: dict[str, bytes],
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heads = []
    monkeypatch.setattr(
        _hub, "OnHub", lambda r, p, head, size: heads.append(head) or Kept(r, p, head, size)
    )
    hub.create("me/x", large)
    Path("r.yaml").write_text("method: squeeze\nadapters: me/x\nrank: 2\n")
    done = typed(*words)
    assert done.code == 0, done.err
    assert len([r for r in hub.asked() if not r.path.startswith("/cdn/")]) <= 3
    weights = large["adapter_model.safetensors"]
    assert [len(head) for head in heads] == [header_end(weights)]
    (asked,) = hub.asked("/cdn/")
    assert asked.range == f"bytes=0-{max(_hub.HEAD, len(weights) // _hub.SHARE) - 1}"
    assert asked.sent <= len(weights) // 16
    assert not list((here.parent / "cache").glob("**/*.safetensors"))


Kept = _hub.OnHub


def test_inspect_says_the_same_of_an_adapter_there_and_here(
    hub: Hub, adapter: dict[str, bytes], here: Path
) -> None:
    hub.create("me/x", adapter)
    Path("x").mkdir()
    for name, data in adapter.items():
        (Path("x") / name).write_bytes(data)
    there, local = (
        json.loads(typed("inspect", name, "--json", "--modules").out) for name in ("me/x", "x")
    )
    assert (there.pop("adapter"), local.pop("adapter")) == ("me/x", "x")
    sha = hub.repositories["me/x"].head.sha
    assert there.pop("origin") == f"hf://me/x@{sha}/adapter_model.safetensors"
    assert local.pop("origin") is None
    assert there == local
    assert there["licence"] == "apache-2.0"


def test_a_path_here_wins_over_a_repository_of_that_name(
    hub: Hub, adapter: dict[str, bytes], here: Path, rng: np.random.Generator
) -> None:
    hub.create("me/x", adapter)
    write_peft(Path("me/x"), factors(rng, 7))
    assert json.loads(typed("inspect", "me/x", "--json").out)["ranks"] == {"7": 3}
    assert hub.asked() == []


@pytest.mark.parametrize("name", ["./me/x", "me/x.safetensors", "me"])
def test_what_can_only_be_a_path_is_never_asked_for(name: str, hub: Hub, here: Path) -> None:
    done = typed("inspect", name)
    assert (done.code, "does not exist" in done.err) == (1, True)
    assert hub.asked() == []


def test_a_revision_is_a_branch_a_tag_or_a_commit(
    hub: Hub, adapter: dict[str, bytes], tmp_path: Path, here: Path, rng: np.random.Generator
) -> None:
    repository = hub.create("me/x", adapter)
    old = repository.head.sha
    repository.refs["v1"] = old
    repository.commit(files(write_peft(tmp_path / "new", factors(rng, 6))))
    repository.commit(files(write_peft(tmp_path / "pr", factors(rng, 5))), ref="refs/pr/1")
    ranks = {
        name: list(json.loads(typed("inspect", name, "--json").out)["ranks"])
        for name in ("me/x", "me/x@main", "me/x@v1", f"me/x@{old}", "me/x@refs/pr/1")
    }
    assert list(ranks.values()) == [["6"], ["6"], ["4"], ["4"], ["5"]]


@pytest.mark.parametrize(
    "text",
    [
        "me/x:sub",
        "me/x@main:sub",
        "me/x:sub/adapter_model.safetensors",
        "hf://me/x@main/sub",
        "{hub}/me/x/tree/main/sub",
        "{hub}/me/x/blob/main/sub/adapter_model.safetensors",
    ],
)
def test_an_adapter_in_a_folder_has_the_config_of_that_folder(
    text: str,
    hub: Hub,
    adapter: dict[str, bytes],
    tmp_path: Path,
    here: Path,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    sub = files(write_peft(tmp_path / "sub", factors(rng, 3), lora_alpha=12), "sub/")
    hub.create("me/x", {**adapter, **sub})
    found = json.loads(typed("inspect", text.format(hub=hub.address), "--json").out)
    assert (found["ranks"], found["scalings"]) == ({"3": 3}, {"4": 3})


def test_several_adapters_are_listed_with_what_to_type(
    hub: Hub, adapter: dict[str, bytes], here: Path
) -> None:
    def below(folder: str) -> dict[str, bytes]:
        return {f"{folder}/{name}": data for name, data in adapter.items()}

    hub.create("me/x", {**below("checkpoint-10"), **below("checkpoint-20"), "README.md": b""})
    done = typed("inspect", "me/x")
    assert done.lines == [
        "error: me/x holds no adapter itself, but 2 further down: me/x:checkpoint-10, "
        "me/x:checkpoint-20.",
        "hint: name one of them, for example: me/x:checkpoint-10",
    ]
    assert typed("inspect", done.lines[1].rpartition(" ")[2]).code == 0


def test_several_files_are_listed_with_what_to_type(
    hub: Hub, adapter: dict[str, bytes], here: Path
) -> None:
    weights = adapter["adapter_model.safetensors"]
    hub.create("me/x", {"v1.safetensors": weights, "v2.safetensors": weights})
    done = typed("inspect", "me/x@main")
    assert done.lines[0] == (
        "error: me/x@main holds 2 safetensors files: me/x@main:v1.safetensors, "
        "me/x@main:v2.safetensors."
    )
    assert done.lines[1] == "hint: name one of them, for example: me/x@main:v1.safetensors"


@pytest.mark.parametrize(
    ("holds", "name", "said", "hint"),
    [
        ({"README.md": b""}, "me/x", "holds no adapter", "it holds: README.md"),
        (
            {"adapter_model.bin": b""},
            "me/x",
            "me/x:adapter_model.bin is a pickle",
            "--allow-pickle",
        ),
        ({"a.pt": b""}, "me/x:a.pt", "me/x:a.pt is a pickle (.pt)", "--allow-pickle"),
        ({"a.txt": b""}, "me/x:a.txt", "is no .safetensors file", "try: me/x"),
        ({"run/a.safetensors": b""}, "me/x:runs", "no such file or folder", "mean 'me/x:run'?"),
        ({"run/a.safetensors": b""}, "me/x:xyz", "no such file or folder", "try: me/x:run"),
        ({"a.safetensors": b"{}"}, "me/x", "me/x:a.safetensors is a JSON text", "safetensors"),
        ({"a.safetensors": b""}, "me/x", "me/x:a.safetensors is empty", "again"),
    ],
)
def test_what_is_no_adapter_is_said_with_what_is_there(
    holds: dict[str, bytes], name: str, said: str, hint: str, hub: Hub, here: Path
) -> None:
    hub.create("me/x", holds)
    done = typed("inspect", name)
    assert (done.code, len(done.lines)) == (1, 2)
    assert said in done.lines[0]
    assert hint in done.lines[1]


def test_a_header_longer_than_what_was_asked_for_is_asked_for_once_more(
    hub: Hub, adapter: dict[str, bytes], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_hub, "HEAD", 100)
    hub.create("me/x", adapter)
    assert typed("inspect", "me/x").code == 0
    end = header_end(adapter["adapter_model.safetensors"])
    assert [request.sent >= end for request in hub.asked("/cdn/")] == [False, True]


def test_scales_that_are_tensors_stay_unread(
    hub: Hub, tmp_path: Path, here: Path, rng: np.random.Generator
) -> None:
    pairs = {f"lora_unet_{n}": (*factors(rng, 4)["layers.0.q_proj"], 8.0) for n in "ab"}
    file = write_kohya(tmp_path / "k.safetensors", pairs)
    hub.create("me/k", {"k.safetensors": file.read_bytes()})
    found = json.loads(typed("inspect", "me/k", "--json", "--modules").out)
    assert found["scalings"] == {"unread": 2}
    assert [one["scaling"] for one in found["each"].values()] == [None, None]
    assert "alphas or gates are stored as tensors" in found["notes"][0]
    assert "scale  unread" in typed("inspect", "me/k").out
    assert typed("squeeze", "me/k", "-r", "2", "--dry-run").code == 0
    Path("r.yaml").write_text("method: squeeze\nadapters: me/k\nrank: 2\n")
    assert typed("run", "r.yaml", "--dry-run").code == 0
    assert not list((tmp_path / "cache").glob("**/*.safetensors"))
    assert {m.scaling for m in lm.load("me/k").modules.values()} == {2.0}


def test_the_client_says_who_asks(hub: Hub, adapter: dict[str, bytes], here: Path) -> None:
    hub.create("me/x", adapter)
    typed("squeeze", "me/x", "-r", "2")
    assert hub.asked()
    assert all(request.agent.startswith("loramerge/") for request in hub.asked())


def test_every_bad_reference_of_several_is_named_at_once(hub: Hub, here: Path) -> None:
    done = typed("inspect", "me/no", "me/nor")
    assert "me/no is neither a path here nor a repository" in done.lines[0]
    assert "me/nor is neither a path here nor a repository" in done.lines[0]
