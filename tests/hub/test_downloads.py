"""Computing with adapters on the Hub: one commit, the cache, no half files."""

import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

import loramerge as lm
from loramerge.events import Advanced, Event, Started
from loramerge.io import _hub
from tests.build import write_peft
from tests.conftest import factors
from tests.hub.conftest import TOKEN, files
from tests.hub.store import Fault, Hub, sha256
from tests.typed import BIN, clean, interrupt, tree, typed


def weights(found: dict[str, bytes]) -> bytes:
    return found["adapter_model.safetensors"]


def test_a_result_is_the_same_from_there_and_from_here(
    hub: Hub, adapter: dict[str, bytes], here: Path
) -> None:
    hub.create("me/x", adapter)
    Path("x").mkdir()
    for name, data in adapter.items():
        (Path("x") / name).write_bytes(data)
    done = typed("squeeze", "me/x", "-r", "2")
    assert (done.code, done.out) == (0, "x-r2\n")
    typed("squeeze", "x", "-r", "2", "-o", "local")
    there, local = (
        json.loads((Path(name) / "loramerge.json").read_text()) for name in ("x-r2", "local")
    )
    assert there["tensors_sha256"] == local["tensors_sha256"]


def test_what_is_recorded_names_the_commit_and_the_licence(
    hub: Hub, adapter: dict[str, bytes], here: Path
) -> None:
    repository = hub.create("me/x", adapter)
    typed("squeeze", "me/x@main", "-r", "2")
    (source,) = json.loads(Path("x-r2/loramerge.json").read_text())["sources"]
    sha = repository.head.sha
    assert source["name"] == "me/x"
    assert source["reference"] == f"hf://me/x@{sha}/adapter_model.safetensors"
    assert source["revision"] == sha
    assert source["licence"] == "apache-2.0"
    assert source["sha256"] == sha256(weights(adapter))


@pytest.mark.parametrize("moves", [False, True])
def test_every_file_is_of_the_commit_that_was_looked_up(
    moves: bool, hub: Hub, adapter: dict[str, bytes], tmp_path: Path, here: Path
) -> None:
    repository = hub.create("me/x", adapter)
    opened = lm.load("me/x")
    first = repository.head.sha
    if moves:
        new = factors(np.random.default_rng(1), 4)
        repository.commit(files(write_peft(tmp_path / "new", new)))
    _hub.fetch([opened], lambda event: None)
    assert opened.origin
    assert opened.origin.revision == first
    assert b"".join(opened.source.chunks()) == weights(adapter)


@pytest.mark.parametrize("name", ["me/x", "me/x@main", "me/x@v1", "me/x:adapter_model.safetensors"])
def test_what_was_used_once_works_without_a_network(
    name: str, hub: Hub, adapter: dict[str, bytes], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = hub.create("me/x", adapter)
    repository.refs["v1"] = repository.head.sha
    assert typed("squeeze", name, "-r", "2", "-o", "online").code == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.forget()
    done = typed("squeeze", name, "-r", "2", "-o", "offline")
    assert done.code == 0, done.err
    assert hub.asked() == []
    for path in Path("online").iterdir():
        assert path.read_bytes() == (Path("offline") / path.name).read_bytes(), path.name


def test_what_was_never_used_is_refused_without_a_network(
    hub: Hub, adapter: dict[str, bytes], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.create("me/x", adapter)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = typed("squeeze", "me/x", "-r", "2")
    assert done.lines == [
        "error: me/x is not among what was downloaded before, and HF_HUB_OFFLINE is set.",
        "hint: unset HF_HUB_OFFLINE, or where there is a network type: loramerge pull me/x",
    ]


def test_what_lies_in_the_cache_is_not_downloaded_again(
    hub: Hub, adapter: dict[str, bytes], here: Path
) -> None:
    hub.create("me/x", adapter)
    typed("squeeze", "me/x", "-r", "2")
    hub.forget()
    assert typed("squeeze", "me/x", "-r", "3").code == 0
    (only,) = hub.asked()
    assert only.path.startswith("/api/models/me/x")


def test_adapters_that_do_not_fit_are_refused_before_anything_is_downloaded(
    hub: Hub, adapter: dict[str, bytes], tmp_path: Path, here: Path, rng: np.random.Generator
) -> None:
    pair = rng.standard_normal((4, 16)), rng.standard_normal((16, 4))
    hub.create("me/x", adapter)
    hub.create("me/y", files(write_peft(tmp_path / "y", {"layers.0.q_proj": pair})))
    done = typed("arithmetic", "me/x", "me/y")
    assert (done.code, "in shape" in done.err) == (1, True)
    assert hub.asked()
    assert all(request.range for request in hub.asked("/resolve/"))


def test_the_token_is_not_sent_to_where_large_files_are(
    hub: Hub, adapter: dict[str, bytes], here: Path
) -> None:
    hub.create("me/x", adapter, private=True).readers.add("me")
    env = {"HF_TOKEN": TOKEN}
    assert typed("inspect", "me/x", env=env).code == 0
    assert typed("squeeze", "me/x", "-r", "2", env=env).code == 0
    assert {request.token for request in hub.asked("/cdn/")} == {None}
    assert {request.token for request in hub.asked("me/x")} == {TOKEN}


def test_several_are_downloaded_side_by_side(
    hub: Hub, tmp_path: Path, here: Path, rng: np.random.Generator
) -> None:
    for name in "abc":
        hub.create(f"me/{name}", files(write_peft(tmp_path / name, factors(rng, 4))))
    opened = [lm.load(f"me/{name}") for name in "abc"]
    hub.faults.append(Fault("/cdn/", times=3, pause=0.3))
    began = time.monotonic()
    _hub.fetch(opened, lambda event: None)
    assert time.monotonic() - began < 0.8  # one after the other: 0.9 s of pauses alone


def test_progress_counts_the_bytes_of_weights(
    hub: Hub, adapter: dict[str, bytes], here: Path
) -> None:
    hub.create("me/x", adapter)
    heard: list[Event] = []
    _hub.fetch([lm.load("me/x")], heard.append)
    assert heard[0] == Started("downloading", len(weights(adapter)))
    come = sum(event.count for event in heard if isinstance(event, Advanced))
    assert come == len(weights(adapter))


def test_a_body_cut_short_yields_no_file(
    hub: Hub, adapter: dict[str, bytes], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.create("me/x", adapter)
    opened = lm.load("me/x")
    hub.faults.append(Fault("/cdn/", times=99, cut=0))
    with pytest.raises(lm.errors.HubError) as refused:
        opened.source.read(next(iter(opened.source.tensors)))
    assert refused.value.hint
    assert not list((here.parent / "cache").glob("**/snapshots/**/*.safetensors"))


def test_a_body_cut_once_is_asked_for_again(
    hub: Hub, adapter: dict[str, bytes], here: Path
) -> None:
    hub.create("me/x", adapter)
    opened = lm.load("me/x")
    hub.faults.append(Fault("/cdn/", cut=1000))
    assert b"".join(opened.source.chunks()) == weights(adapter)
    assert [request.sent for request in hub.asked("/cdn/")][-2:] == [1000, len(weights(adapter))]


@pytest.mark.parametrize(
    ("names", "sent"), [(("me/x",), signal.SIGKILL), (("me/x", "me/y"), signal.SIGINT)]
)
def test_a_download_that_is_stopped_leaves_nothing_and_the_next_one_succeeds(
    names: tuple[str, ...],
    sent: signal.Signals,
    hub: Hub,
    tmp_path: Path,
    here: Path,
    rng: np.random.Generator,
) -> None:
    large = {"up_proj": (rng.standard_normal((64, 1024)), rng.standard_normal((1024, 64)))}
    for name in names:
        hub.create(name, files(write_peft(tmp_path / name, large)))
    env = {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    words = [str(BIN / "loramerge"), "cat", *names, "-o", "out", "-q"]
    slow = Fault("/cdn/", times=99, pause=0.2)
    hub.faults.append(slow)
    process = subprocess.Popen(words, env=clean(env), cwd=here, stderr=subprocess.PIPE, text=True)
    while not [r for r in hub.requests if r.method == "HEAD" and r.path.endswith("safetensors")]:
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)
    began = time.monotonic()
    said = interrupt(process, sent)
    assert time.monotonic() - began < 2  # what is left of each download takes 6 s
    if sent == signal.SIGINT:
        assert (process.returncode, said) == (130, "\nstopped\n")
    assert tree(here) == []
    slow.times, slow.pause = 0, 0
    done = subprocess.run(words, env=clean(env), cwd=here, check=False, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"out\n", b"")
    assert {path.name for path in here.iterdir()} == {"out"}


def test_python_takes_references_too(
    hub: Hub, adapter: dict[str, bytes], here: Path, tmp_path: Path
) -> None:
    hub.create("me/x", adapter)
    merged, report = lm.arithmetic(["me/x", lm.load("me/x@main")], weights=[1, 0.5])
    assert [source["name"] for source in report.as_json()["sources"]] == ["me/x", "me/x"]
    assert merged.save(tmp_path / "out").is_dir()


def test_diff_compares_there_with_here(hub: Hub, adapter: dict[str, bytes], here: Path) -> None:
    hub.create("me/x", adapter)
    typed("squeeze", "me/x", "-r", "full", "-o", "same")
    assert typed("diff", "me/x", "same", "--fail-above", "1e-6").code == 0


def test_the_environment_of_the_client_is_honoured_in_a_process_of_its_own(
    hub: Hub, adapter: dict[str, bytes], here: Path, tmp_path: Path
) -> None:
    hub.create("me/x", adapter, private=True).readers.add("me")
    env = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        words = [str(BIN / "loramerge"), "squeeze", "me/x", "-r", "2", "-q", "-f"]
        return subprocess.run(
            words,
            env=clean({**env, **more}),
            cwd=here,
            check=False,
            capture_output=True,
            text=True,
        )

    online = run()
    assert (online.returncode, online.stdout, online.stderr) == (0, "x-r2\n", "")
    assert list((tmp_path / "home" / "hub").glob("**/snapshots/*/adapter_model.safetensors"))
    assert run(HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9").returncode == 0


def test_a_download_that_is_not_the_file_of_the_hub_is_refused(
    hub: Hub, adapter: dict[str, bytes], here: Path, tmp_path: Path
) -> None:
    hub.create("me/x", adapter)
    assert typed("squeeze", "me/x", "-r", "2").code == 0
    (link,) = (tmp_path / "cache").glob("**/snapshots/*/adapter_model.safetensors")
    link.resolve().write_bytes(weights(adapter)[:-4] + bytes(4))
    done = typed("squeeze", "me/x", "-r", "2", "-o", "again")
    assert done.lines[0] == "error: me/x: the downloaded file is not the one on the Hub."
    assert (done.code, tree(here / "x-r2") != [], (here / "again").exists()) == (1, True, False)


@pytest.mark.parametrize("words", ["squeeze me/x -r 2 -o out", "convert me/x --to mlx -o k"])
def test_a_tokenizer_that_stays_on_the_hub_is_named(
    words: str, hub: Hub, adapter: dict[str, bytes], here: Path
) -> None:
    hub.create("me/x", {**adapter, "tokenizer.json": b"{}"})
    done = typed(*words.split())
    assert "files of a tokenizer stay on the Hub: tokenizer.json" in " ".join(done.err.split())
