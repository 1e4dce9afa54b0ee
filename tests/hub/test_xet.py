"""Large files by xet, the Hub's way of storing them in chunks, from and to a store on this disk."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hub.conftest import TOKEN, files
from tests.hub.store import Fault, Hub, sha256
from tests.typed import Typed, shell, tree, typed

WEIGHTS = "adapter_model.safetensors"


Store = Callable[[bytes, str], str]


@pytest.fixture
def store(hub: Hub, tmp_path: Path) -> Store:
    """Puts a file in chunks into a store, and tells its name there; the Hub has a directory."""
    xet = pytest.importorskip("hf_xet", reason="needs hf_xet, a part of huggingface_hub")

    def put(data: bytes, where: str) -> str:
        with xet.XetSession().new_upload_commit(endpoint=where) as commit:
            handle = commit.start_upload_bytes(data)
        name: str = handle.result().xet_info.hash
        return name

    hub.cas = f"local://{tmp_path / 'cas'}"
    try:
        put(b"probe", hub.cas)
    except Exception as error:
        pytest.skip(f"needs an hf_xet that takes a directory (local://) as a store: {error}")
    return put


@pytest.fixture
def stored(hub: Hub, store: Store, adapter: dict[str, bytes]) -> None:
    """The repository me/x, whose weights are in chunks."""
    hub.create("me/x", adapter)
    hub.xet[sha256(adapter[WEIGHTS])] = store(adapter[WEIGHTS], hub.cas)


def run(words: str, hub: Hub, here: Path) -> Typed:
    """Type it in a process of its own, with a cache of its own."""
    home = here.parent / f"home-{len(tree(here.parent))}"
    home.mkdir()
    env = {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_TOKEN": TOKEN}
    return shell(f"loramerge {words}", here, {**env, "HF_HUB_DISABLE_TELEMETRY": "1"})


def test_weights_in_chunks_are_downloaded_whole(
    hub: Hub, stored: None, adapter: dict[str, bytes], here: Path
) -> None:
    done = run("pull me/x -o got", hub, here)
    assert (done.code, done.out, done.err) == (0, "got\n", "")
    assert files(here / "got") == adapter
    assert hub.asked("xet-read-token")
    assert not hub.asked("/cdn/")


def test_a_result_of_weights_in_chunks_is_that_of_the_same_weights_here(
    hub: Hub, stored: None, adapter: dict[str, bytes], here: Path
) -> None:
    done = run("squeeze me/x --rank 2 -o there -q", hub, here)
    assert (done.code, done.err) == (0, "")
    assert all(request.range for request in hub.asked("/cdn/"))  # the header, read from afar
    (here / "x").mkdir()
    for name, data in adapter.items():
        (here / "x" / name).write_bytes(data)
    assert typed("squeeze", "x", "--rank", "2", "-o", "local").code == 0
    assert typed("diff", "there", "local", "--fail-above", "0").code == 0


def test_what_is_pushed_in_chunks_comes_back_from_them(
    hub: Hub, store: Store, adapter: dict[str, bytes], here: Path
) -> None:
    (here / "a").mkdir()
    for name, data in adapter.items():
        (here / "a" / name).write_bytes(data)
    digest = sha256(adapter[WEIGHTS])
    hub.blobs[digest] = adapter[WEIGHTS]  # a commit names what the store is trusted to hold
    done = run("push a me/a", hub, here)
    assert done.code == 0, done.err
    assert hub.asked("xet-write-token")
    assert not hub.asked("/lfs/")
    hub.xet[digest] = store(adapter[WEIGHTS], f"local://{here.parent / 'another'}")
    assert run("pull me/a -o back", hub, here).code == 0
    assert files(here / "back") == files(here / "a")
    assert not hub.asked("/cdn/")


def test_chunks_that_are_gone_yield_no_file(hub: Hub, stored: None, here: Path) -> None:
    shutil.rmtree(hub.cas.removeprefix("local://"))
    done = run("pull me/x", hub, here)
    assert (done.code, done.out) == (1, "")
    assert done.lines[0] == "error: me/x: the transfer broke off."
    assert tree(here) == []


def test_a_hub_that_does_not_say_where_chunks_are_is_none(
    hub: Hub, stored: None, here: Path
) -> None:
    hub.faults.append(Fault("xet-read-token", times=9, status=200))
    done = run("pull me/x", hub, here)
    assert (done.code, done.out) == (1, "")
    assert done.lines[0] == f"error: {hub.address} does not answer as the Hub does."
    assert tree(here) == []
