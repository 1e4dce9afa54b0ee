"""Results of adapters on the Hub, made again from nothing but themselves."""

import json
import shutil
from pathlib import Path

import pytest

from tests.hub.conftest import TOKEN
from tests.hub.store import Hub
from tests.test_api import bytes_of
from tests.typed import typed

RECIPE = """
steps:
- {name: merged, method: arithmetic, adapters: [me/x@main, {reference: me/y, weight: -0.5}]}
- {name: small, method: squeeze, adapters: merged, energy: 0.9}
- {method: prune, adapters: small, threshold: 0.1}
"""


def test_a_third_party_needs_nothing_but_the_output(
    hub: Hub, adapter: dict[str, bytes], tmp_path: Path, here: Path
) -> None:
    repositories = [hub.create(name, adapter) for name in ("me/x", "me/y")]
    Path("recipe.yaml").write_text(RECIPE)
    done = typed("run", "recipe.yaml", "-o", "out")
    assert done.code == 0, done.err
    for repository in repositories:
        repository.commit({**adapter, "adapter_model.safetensors": b"something else"})
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree("out", elsewhere / "out")
    again = typed("reproduce", elsewhere / "out", "-o", elsewhere / "again")
    assert again.code == 0, again.err
    assert bytes_of(elsewhere / "again") == bytes_of(Path("out"))


@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
def test_what_was_pushed_is_reproduced_from_its_download_or_where_it_is(
    hub: Hub, adapter: dict[str, bytes], tmp_path: Path, here: Path
) -> None:
    hub.create("user/repo", adapter)
    words = ("squeeze", "user/repo@main", "--rank", "2", "--push", "me/repo-r2")
    assert typed(*words, env={"HF_TOKEN": TOKEN}).code == 0
    first = bytes_of(Path("repo-r2"))
    shutil.rmtree("repo-r2")
    assert typed("pull", "me/repo-r2").code == 0
    for name in ("repo-r2", "me/repo-r2"):
        done = typed("reproduce", name, "-o", "again", "-f")
        assert done.code == 0, done.err
        assert "the same tensors, bit for bit" in done.err
        assert bytes_of(Path("again")) == first
    assert "reproduce me/repo-r2" in Path("repo-r2/README.md").read_text()


def test_a_recipe_of_references_is_saved_as_it_was_typed(
    hub: Hub, adapter: dict[str, bytes], here: Path
) -> None:
    hub.create("me/x", adapter)
    assert typed("squeeze", "me/x@main", "-r", "2", "--save-recipe", "s.yaml").code == 0
    assert Path("s.yaml").read_text() == "method: squeeze\nadapters:\n  - me/x@main\nrank: 2\n"
    first = bytes_of(Path("x-r2"))
    assert typed("run", "s.yaml", "-f").code == 0
    assert bytes_of(Path("x-r2")) == first
    assert json.loads(first["loramerge.json"])["sources"][0]["name"] == "me/x"


def test_the_recipe_of_a_result_names_commits_and_makes_its_bytes(
    hub: Hub, adapter: dict[str, bytes], here: Path
) -> None:
    repositories = [hub.create(name, adapter) for name in ("me/x", "me/y")]
    Path("recipe.yaml").write_text(RECIPE)
    assert typed("run", "recipe.yaml", "-o", "out").code == 0
    for repository in repositories:
        repository.commit({**adapter, "adapter_model.safetensors": b"something else"})
    assert typed("reproduce", "out", "--save-recipe", "way.yaml").code == 0
    assert f"hf://me/x@{repositories[0].commits[0].sha}" in Path("way.yaml").read_text()
    done = typed("run", "way.yaml", "-o", "again")
    assert done.code == 0, done.err
    assert bytes_of(Path("again")) == bytes_of(Path("out"))


def test_a_copy_of_a_source_here_makes_the_same_bytes_as_the_hub(
    hub: Hub, adapter: dict[str, bytes], here: Path
) -> None:
    for name in ("me/x", "me/y"):
        hub.create(name, {**adapter, "tokenizer.json": b"{}"})
    Path("recipe.yaml").write_text(RECIPE)
    assert typed("run", "recipe.yaml", "-o", "out").code == 0
    assert typed("pull", "me/x").code == 0
    Path("x").rename("copied")
    for _ in range(2):  # under another name, then under its own
        done = typed("reproduce", "out", "-o", "again", "--save-recipe", "way.yaml", "-f")
        assert done.code == 0, done.err
        assert bytes_of(Path("again")) == bytes_of(Path("out"))
        assert "hf://me/x@" in Path("way.yaml").read_text()
        if Path("copied").exists():
            Path("copied").rename("x")


def test_a_copy_of_a_source_is_not_replaced_by_what_is_made_of_it(
    hub: Hub, adapter: dict[str, bytes], here: Path
) -> None:
    hub.create("me/x", adapter)
    assert typed("squeeze", "me/x", "-r", "2").code == 0
    assert typed("pull", "me/x").code == 0
    done = typed("reproduce", "x-r2", "-o", "x", "-f")
    assert (done.code, "x would replace the input" in done.lines[0]) == (1, True)
