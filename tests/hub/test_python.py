"""pull and push as Python functions: what the commands do, with the same defaults."""

import inspect
import re
import shlex
from pathlib import Path

import pytest
from huggingface_hub import constants

import loramerge as lm
from loramerge.cli import written
from tests.hub.conftest import TOKEN
from tests.hub.store import Hub
from tests.test_api import bytes_of
from tests.typed import ROOT, typed

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


def test_a_pull_is_that_of_the_command(hub: Hub, adapter: dict[str, bytes], here: Path) -> None:
    hub.create("me/x", adapter)
    assert lm.pull("me/x@main") == Path("x")
    assert lm.pull("me/x", "deep/y") == Path("deep/y")
    assert lm.pull("me/x", Path("x"), force=True) == Path("x")
    assert typed("pull", "me/x", "-o", "typed").code == 0
    for name in ("x", "deep/y"):
        assert bytes_of(Path(name)) == bytes_of(Path("typed"))
    with pytest.raises(lm.errors.OutputError, match="x exists"):
        lm.pull("me/x")


def test_a_push_is_that_of_the_command(
    hub: Hub, adapter: dict[str, bytes], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.create("me/x", adapter)
    x = lm.pull("me/x")
    done = lm.push(x, "me/python", private=True, message="first")
    assert (done.url, done.changed) == (f"{hub.address}/me/python", True)
    assert not lm.push(str(x), "me/python").changed
    assert typed("push", "x", "me/typed", "--private", "-m", "first").code == 0
    python, command = (hub.repositories[f"me/{name}"] for name in ("python", "typed"))
    assert python.head.files == command.head.files
    assert (python.private, python.head.title) == (command.private, "first")
    (x / "LICENSE").write_text("terms")
    assert lm.push(x, "me/python", create_pr=True).url.endswith("/me/python/discussions/1")
    assert "LICENSE" not in python.head.files


def test_a_result_is_pushed_unsaved_and_is_what_the_command_pushes(
    hub: Hub, adapter: dict[str, bytes], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.create("me/x", adapter)
    small, _ = lm.squeeze("me/x", rank=2)
    lm.push(small, "me/small")
    words = ("--push", "me/small")
    assert ", where it was already" in typed("squeeze", "me/x", "-r", "2", *words).err


@pytest.mark.parametrize("name", ["pull", "push"])
def test_switches_have_the_names_of_the_command(name: str) -> None:
    typed_names = {parameter.name for parameter in written()["Hub"][name].params}
    names = set(inspect.signature(getattr(lm, name)).parameters)
    switches = {"force", "private", "create_pr", "message"}
    assert names & switches == typed_names & switches != set()


def test_the_page_about_the_hub_can_be_typed_as_it_stands(
    hub: Hub, adapter: dict[str, bytes], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("user/repo", "user/other"):
        sub = {f"checkpoint-10/{file}": data for file, data in adapter.items()}
        made = hub.create(name, {**adapter, **sub})
        made.refs["v1"] = made.head.sha
    page = (ROOT / "docs" / "hub.md").read_text()
    kinds: dict[str, int] = {}
    for kind, block in re.findall(r"```(sh|python)\n(.*?)```", page, re.S):
        kinds[kind] = kinds.get(kind, 0) + 1
        if kind == "python":
            exec(block, {})
            continue
        for line in block.splitlines():
            command = line.partition("#")[0]
            settings, words = re.match(r"((?:HF_\w+=\S+ )*)loramerge (.*)", command).groups()
            offline = "HF_HUB_OFFLINE=1" in settings
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
            done = typed(*shlex.split(words))
            assert done.code == 0, (line, done.err)
    assert min(kinds["sh"], kinds["python"]) > 0
