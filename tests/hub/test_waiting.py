"""Waiting for the Hub: downloads side by side whatever the command, and a sign of life."""

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save_file

import loramerge
from loramerge.cli import progress as bars
from loramerge.events import Advanced, Event, Listener, Started
from loramerge.io import _hub_client
from tests.build import write_kohya, write_peft
from tests.conftest import factors
from tests.hub.conftest import TOKEN, files
from tests.hub.store import Fault, Hub
from tests.test_terminal import on_a_terminal
from tests.typed import BIN, clean, interrupt, shell, typed

# Between the client and its own HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """What a terminal would be told by a command."""
    events: list[Event] = []

    @contextmanager
    def listening(quiet: bool) -> Iterator[Listener]:
        yield events.append

    monkeypatch.setattr(bars, "progress", listening)
    return events


@pytest.fixture
def both(hub: Hub, tmp_path: Path, here: Path, rng: np.random.Generator) -> int:
    """The adapters me/a and me/b on the Hub, what they are for here; the bytes of both."""
    sizes = []
    for name in "ab":
        found = files(write_peft(tmp_path / name, factors(rng, 4)))
        hub.create(f"me/{name}", found)
        sizes.append(len(found["adapter_model.safetensors"]))
    shapes = {name: (B.shape[0], A.shape[1]) for name, (A, B) in factors(rng, 4).items()}
    weights = {f"{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()}
    Path("base").mkdir()
    save_file(weights, "base/model.safetensors")
    Path("r.yaml").write_text("method: cat\nadapters: [me/a, me/b]\n")
    return sum(sizes)


def downloaded(events: list[Event]) -> tuple[int, int]:
    """Bytes that were announced in one go, and that came."""
    (place,) = (
        n for n, e in enumerate(events) if isinstance(e, Started) and e.stage == "downloading"
    )
    come = 0
    for event in events[place + 1 :]:
        if not isinstance(event, Advanced):
            break
        come += event.count
    started = events[place]
    assert isinstance(started, Started)
    return started.total, come


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("cat me/a me/b", 0),
        ("run r.yaml", 0),
        ("squeeze me/a me/b -r 2 --out-dir small", 0),
        ("cluster me/a me/b --sweep-k 2,3", 0),
        ("compare me/a me/b --methods arithmetic,ties", 0),
        ("diff me/a me/b", 0),
        ("verify me/a --against me/b", 3),
        ("convert me/a --initial me/b --to peft", 0),
    ],
)
def test_two_adapters_are_downloaded_at_once_by_every_command(
    line: str, code: int, both: int, heard: list[Event]
) -> None:
    done = typed(*line.split())
    assert done.code == code, done.err
    assert downloaded(heard) == (both, both)
    assert heard[0] == Started("asking the Hub", 0)


@pytest.mark.parametrize(
    "line",
    [
        "pull me/a",
        "bake me/a --base base",
        "bake me/a@main --base base -r 2",
        "convert me/a --to mlx",
        "split me/a --every 2",
        "select me/a --ranks 0-1",
        "verify me/a",
    ],
)
def test_one_adapter_is_downloaded_with_its_progress_told(
    line: str, hub: Hub, both: int, heard: list[Event]
) -> None:
    done = typed(*line.split())
    assert done.code == 0, done.err
    total, come = downloaded(heard)
    assert total == come == len(hub.repositories["me/a"].head.files["adapter_model.safetensors"])
    assert "@" not in done.out  # nothing is called after a revision


def test_sources_are_downloaded_at_once_to_make_a_result_again(
    both: int, heard: list[Event], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert typed("cat", "me/a", "me/b", "-o", "out").code == 0
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "another"))
    heard.clear()
    assert typed("reproduce", "out").code == 0
    assert downloaded(heard) == (both, both)


def test_files_whose_scales_are_tensors_are_downloaded_at_once_to_be_opened(
    hub: Hub, tmp_path: Path, here: Path, heard: list[Event], rng: np.random.Generator
) -> None:
    pair = factors(rng, 4)["layers.0.q_proj"]
    sizes = []
    for name in "xy":
        file = write_kohya(tmp_path / f"{name}.safetensors", {"lora_unet_a": (*pair, 8.0)})
        hub.create(f"me/{name}", {file.name: file.read_bytes()})
        sizes.append(file.stat().st_size)
    assert typed("cat", "me/x", "me/y").code == 0
    assert downloaded(heard) == (sum(sizes), sum(sizes))


@pytest.fixture
def mute() -> Iterator[str]:
    """The address of a Hub that takes calls and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("line", ["pull me/x", "cat me/x me/y"])
def test_a_hub_that_does_not_answer_is_waited_for_in_sight(
    line: str, mute: str, tmp_path: Path
) -> None:
    env = {"HF_ENDPOINT": mute, "HF_HOME": str(tmp_path / "home")}
    out, seen = on_a_terminal(line.split(), tmp_path, 80, until="asking the Hub", **env)
    assert out == ""
    assert seen.rstrip().endswith("stopped")


def test_a_hub_that_does_not_answer_is_waited_for_in_silence_where_nobody_looks(
    mute: str, tmp_path: Path
) -> None:
    env = {"HF_ENDPOINT": mute, "HF_HOME": str(tmp_path / "home")}
    process = subprocess.Popen(
        [BIN / "loramerge", "inspect", "me/x"], env=clean(env), stderr=subprocess.PIPE, text=True
    )
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=bars.PATIENCE + 1)
    assert interrupt(process) == "\nstopped\n"
    assert process.returncode == 130


def test_a_hub_that_never_answers_is_given_up(mute: str, here: Path) -> None:
    env = {"HF_ENDPOINT": mute, "HF_HUB_ETAG_TIMEOUT": "1"}
    done = shell("loramerge inspect me/x", here, env)
    assert done.code == 1
    assert done.lines == [
        f"error: {mute} does not answer.",
        "hint: wait, or type it again with HF_HUB_OFFLINE=1 to use what was downloaded before",
    ]


@pytest.mark.parametrize("line", ["push a me/a", "squeeze a -r 2 --push me/a"])
def test_a_hub_that_never_answers_is_sent_nothing(line: str, mute: str, a: Path) -> None:
    env = {"HF_ENDPOINT": mute, "HF_HUB_ETAG_TIMEOUT": "1", "HF_TOKEN": TOKEN}
    done = shell(f"loramerge {line}", a.parent, env)
    assert done.code == 1
    assert done.lines == [
        f"error: {mute} does not answer.",
        "hint: type it again later: nothing was sent",
    ]
    assert [path.name for path in a.parent.iterdir()] == ["a"]


def test_a_server_of_files_that_never_answers_is_given_up(
    hub: Hub, mute: str, adapter: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.create("me/x", adapter)
    hub.cdn = mute
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    done = typed("inspect", "me/x")
    assert (done.code, done.lines[0]) == (1, "error: me/x: the transfer broke off.")


@pytest.mark.parametrize("path", ["/api/repos/create", "/commit/"])
@pytest.mark.parametrize("line", ["push a me/a", "squeeze a -r 2 --push me/a"])
def test_a_hub_that_falls_silent_within_a_push_is_given_up(
    line: str, path: str, hub: Hub, a: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_hub_client, "SILENCE", 0.2)
    hub.faults.append(Fault(path, method="POST", silence=1))
    done = typed(*line.split(), env={"HF_TOKEN": TOKEN})
    assert (done.code, done.lines[-2]) == (1, "error: me/a: the transfer broke off.")


def test_a_push_from_python_leaves_the_clients_own_settings_alone(
    hub: Hub, a: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    before = huggingface_hub.get_session().timeout
    loramerge.push(a, "me/a")
    assert huggingface_hub.get_session().timeout == before
