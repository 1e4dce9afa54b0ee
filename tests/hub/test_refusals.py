"""What the Hub and the network refuse: one sentence, the next thing to type, exit code 1."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from loramerge.io import _hub_client
from tests.hub.conftest import TOKEN
from tests.hub.store import Fault, Hub
from tests.typed import Typed, tree, typed


def refused(*words: str, env: dict[str, str] | None = None) -> Typed:
    """Type it and check what all refusals have in common; nothing is left behind."""
    done = typed(*words, env=env)
    assert (done.code, done.out) == (1, ""), done.err
    assert [line.partition(":")[0] for line in done.lines] == ["error", "hint"], done.err
    assert done.lines[0].endswith(".")
    assert "defect" not in done.err
    assert tree(Path()) == []
    return done


SQUEEZE = ("squeeze", "me/x", "-r", "2")
WORDS = [("inspect", "me/x"), SQUEEZE]


@pytest.mark.parametrize("words", WORDS)
def test_a_repository_that_is_not_there(words: tuple[str, ...], hub: Hub, here: Path) -> None:
    assert refused(*words).lines == [
        "error: me/x is neither a path here nor a repository on the Hub that you may see.",
        "hint: check how it is spelt; if it is private, log in first: hf auth login",
    ]


def test_a_private_repository_of_somebody_else(
    hub: Hub, adapter: dict[str, bytes], here: Path
) -> None:
    hub.create("me/x", adapter, private=True)
    assert refused("inspect", "me/x", env={"HF_TOKEN": TOKEN}).lines == [
        "error: me/x is neither a path here nor a repository on the Hub that you may see.",
        "hint: check how it is spelt; if it is private, see whether your token may read it: "
        "hf auth whoami",
    ]


def test_a_private_repository_opens_to_its_reader(
    hub: Hub, adapter: dict[str, bytes], here: Path
) -> None:
    hub.create("me/x", adapter, private=True).readers.add("me")
    assert typed(*SQUEEZE, env={"HF_TOKEN": TOKEN}).code == 0


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("token", [None, TOKEN])
def test_a_gated_repository(
    words: tuple[str, ...], token: str | None, hub: Hub, adapter: dict[str, bytes], here: Path
) -> None:
    hub.create("me/x", adapter, gated=True)
    done = refused(*words, env={"HF_TOKEN": token} if token else None)
    assert done.lines[0] == "error: me/x is gated: its owners let in only those who asked."
    then = "then type it again" if token else "and log in first: hf auth login"
    assert done.lines[1] == f"hint: accept its terms at {hub.address}/me/x, {then}"
    assert {request.token for request in hub.asked()} == {token}


def test_a_gated_repository_opens_to_who_was_let_in(
    hub: Hub, adapter: dict[str, bytes], here: Path
) -> None:
    hub.create("me/x", adapter, gated=True).readers.add("me")
    assert typed(*SQUEEZE, env={"HF_TOKEN": TOKEN}).code == 0


def test_a_token_that_nobody_has(hub: Hub, adapter: dict[str, bytes], here: Path) -> None:
    hub.create("me/x", adapter)
    done = refused("inspect", "me/x", env={"HF_TOKEN": "hf_wrong"})
    assert done.lines == [
        "error: The Hub does not know your token.",
        "hint: log in again: hf auth login",
    ]


def test_a_revision_that_is_not_there(hub: Hub, adapter: dict[str, bytes], here: Path) -> None:
    repository = hub.create("me/x", adapter)
    repository.refs["v1"] = repository.head.sha
    done = refused("inspect", "me/x@v2")
    assert done.lines == [
        "error: me/x@v2: there is no such revision.",
        "hint: there are: main, v1",
    ]


def test_a_file_that_is_not_there(hub: Hub, adapter: dict[str, bytes], here: Path) -> None:
    hub.create("me/x", adapter)
    assert refused("inspect", "me/x@main:adapter_mode.safetensors").lines == [
        "error: me/x@main:adapter_mode.safetensors: there is no such file or folder.",
        "hint: did you mean 'me/x@main:adapter_model.safetensors'?",
    ]


def test_a_file_that_went_away_meanwhile(hub: Hub, adapter: dict[str, bytes], here: Path) -> None:
    hub.create("me/x", adapter)
    hub.faults.append(Fault("/resolve/", 9, 404, headers={"X-Error-Code": "EntryNotFound"}))
    assert refused("inspect", "me/x").lines == [
        "error: me/x: there is no such file.",
        f"hint: see: {hub.address}/me/x/tree/main",
    ]


def test_a_name_that_no_repository_can_have(hub: Hub, here: Path) -> None:
    done = typed("inspect", "me/x..y")
    assert done.code == 2
    assert done.lines[0] == "error: me/x..y is no name of a repository."
    assert hub.asked() == []


@pytest.mark.parametrize("path", ["/api/models", "/resolve/"])
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_asked_again(
    path: str, status: int, hub: Hub, adapter: dict[str, bytes], here: Path
) -> None:
    hub.create("me/x", adapter)
    hub.faults.append(Fault(path, status=status, times=2))
    assert typed("inspect", "me/x").code == 0
    assert len(hub.asked(path)) >= 3


def test_a_download_outlasts_a_busy_hub(hub: Hub, adapter: dict[str, bytes], here: Path) -> None:
    hub.create("me/x", adapter)
    hub.faults += [Fault("/resolve/", method="HEAD", status=503, times=2)]
    assert typed(*SQUEEZE).code == 0


@pytest.mark.parametrize(
    ("headers", "when"),
    [
        ({"Retry-After": "240"}, "in 240 seconds"),
        ({"RateLimit": '"api";r=0;t=55'}, "in 55 seconds"),
        ({}, "later"),
    ],
)
def test_a_rate_limit_says_when_to_type_it_again(
    headers: dict[str, str], when: str, hub: Hub, here: Path
) -> None:
    hub.faults.append(Fault("/api/models", times=9, status=429, headers=headers))
    done = refused("inspect", "me/x")
    assert done.lines[0] == "error: The Hub takes no more requests from you now."
    more = "who is logged in may ask more often: hf auth login"
    assert done.lines[1] == f"hint: type it {when}; {more}"
    assert len(hub.asked()) == (1 if headers else 4)


def test_a_hub_out_of_order(hub: Hub, here: Path) -> None:
    hub.faults.append(Fault("/api/models", times=9, status=502))
    done = refused("inspect", "me/x")
    assert done.lines == ["error: The Hub answers 502 for me/x.", "hint: type it again later"]


@pytest.mark.parametrize("words", WORDS)
def test_an_endpoint_where_nobody_answers(
    words: tuple[str, ...], hub: Hub, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    _hub_client.client.cache_clear()
    done = refused(*words)
    assert done.lines == [
        "error: http://127.0.0.1:9 cannot be reached.",
        "hint: check the network, or type it again with HF_HUB_OFFLINE=1 to use what was "
        "downloaded before",
    ]


def test_an_endpoint_that_is_no_hub(hub: Hub, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.faults.append(Fault("/api/models", times=9, status=200))
    done = refused("inspect", "me/x")
    assert done.lines == [
        f"error: {hub.address} does not answer as the Hub does.",
        "hint: check HF_ENDPOINT and the proxy of your network",
    ]


def test_a_model_page_that_is_disabled(hub: Hub, adapter: dict[str, bytes], here: Path) -> None:
    hub.create("me/x", adapter)
    message = {"X-Error-Message": "Access to this resource is disabled."}
    hub.faults.append(Fault("/resolve/", status=403, headers=message))
    assert refused("inspect", "me/x").lines == [
        "error: me/x is disabled on the Hub.",
        f"hint: see why: {hub.address}/me/x",
    ]
