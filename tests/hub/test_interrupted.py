"""Transfers that end too early, for want of a network or of room: one sentence, no half file."""

import errno
import re
from collections import namedtuple
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.hub.store import Fault, Hub
from tests.hub.test_refusals import SQUEEZE, refused
from tests.typed import typed

BROKEN_OFF = [
    "error: me/x: the transfer broke off.",
    "hint: type it again: files that arrived whole are kept",
]


@pytest.mark.parametrize("command", ["pull me/x", "squeeze me/x -r 2"])
def test_a_download_that_breaks_off_again_and_again(
    command: str, hub: Hub, adapter: dict[str, bytes], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
    hub.create("me/x", adapter)
    looks = [Fault("/cdn/")] if command.startswith("squeeze") else []  # at the header: whole
    hub.faults += [*looks, Fault("/cdn/", cut=1000), Fault("/cdn/", times=99, cut=0)]
    assert refused(*command.split()).lines == BROKEN_OFF
    assert {r.range for r in hub.asked("/cdn/")} >= {"bytes=1000-"}  # it had tried to go on
    assert not [path for path in here.parent.rglob("cache/**/*") if "incomplete" in path.name]
    hub.faults.clear()
    hub.forget()
    assert typed(*command.split()).code == 0
    # Config and card were there already.
    assert all(request.range for request in hub.asked("/resolve/") if request.method == "GET")


@pytest.mark.parametrize("library", ["httpx", "httpx2"])  # of older and newer clients
def test_a_hub_that_falls_silent(
    library: str,
    hub: Hub,
    adapter: dict[str, bytes],
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.create("me/x", adapter)

    def silent(*anything: object, **more: object) -> None:
        raise type("ReadTimeout", (Exception,), {"__module__": library})

    monkeypatch.setattr("huggingface_hub.file_download.http_get", silent)
    assert refused("pull", "me/x").lines == BROKEN_OFF


def test_a_full_disk(
    hub: Hub, adapter: dict[str, bytes], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.create("me/x", adapter)

    def full(*anything: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    free = namedtuple("free", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: free(1, 1, 0))  # the client warns of it
    for words in (SQUEEZE, ("pull", "me/x")):
        assert refused(*words).lines == [
            "error: me/x cannot be downloaded: the disk with the Hub's cache is full.",
            "hint: free some space, or set HF_HOME to a directory on another disk",
        ]


def test_a_full_disk_where_a_pull_goes_to(
    hub: Hub, adapter: dict[str, bytes], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.create("me/x", adapter)

    def full(*anything: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("loramerge.exchange.shutil.copyfile", full)
    assert refused("pull", "me/x").lines == [
        "error: x cannot be written: No space left on device.",
        "hint: free some space, or choose another disk",
    ]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EFBIG, "File too large"), "cannot be kept in the cache: File too large."),
        (ConnectionResetError(errno.ECONNRESET, "reset by peer"), "the transfer broke off."),
        (OSError("Consistency check failed"), "the transfer broke off."),
    ],
)
def test_what_the_system_refuses_in_the_middle_of_a_download(
    error: OSError,
    said: str,
    hub: Hub,
    adapter: dict[str, bytes],
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.create("me/x", adapter)

    def refuse(*anything: object, **more: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.file_download.http_get", refuse)
    assert said in refused("pull", "me/x").lines[0]


def test_a_cache_that_may_not_be_written(
    hub: Hub, adapter: dict[str, bytes], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.create("me/x", adapter)
    (here.parent / "cache").write_text("a file where a directory should be")
    done = refused(*SQUEEZE)
    assert re.search(r"me/x cannot be kept in .*: (Not a directory|File exists)\.", done.lines[0])
    assert "HF_HOME" in done.lines[1]
