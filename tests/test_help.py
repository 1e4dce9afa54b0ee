"""Help pages: grouped, narrow enough, and each ends with a command that works."""

import json
import shlex
import shutil
from pathlib import Path

import click
import pytest
from safetensors.torch import load_file, save_file

from loramerge.cli import cli, flags, written
from loramerge.cli.command import Command, Flag
from loramerge.recipe import find
from loramerge.report import SCHEMA_VERSION
from tests.typed import bare, shell, typed

BASE = Path(__file__).parents[1] / "fixtures" / "testbed" / "base"
CONTEXT = cli.make_context("loramerge", ["--help"], resilient_parsing=True)
NAMES = cli.list_commands(CONTEXT)
WRITTEN = {name for commands in written().values() for name in commands}
SHARED = {max(one.opts, key=len): one for one in vars(flags).values() if isinstance(one, Flag)}
# Where a command says of a shared flag what it means there.
SAID = {
    ("reproduce", "--out"),
    ("reproduce", "--device"),
    ("split", "--out-dir"),
    ("pull", "--out"),
}
SAID |= {("reproduce", "--save-recipe"), ("run", "--save-recipe"), ("run", "--out")}
SAID |= {("push", flag) for flag in ("--private", "--create-pr", "--message", "--quiet")}
# What writes nothing, so that there is nothing to replace.
READS = set(written()["Look"])
RECIPE = """
steps:
- {name: merged, method: cat, adapters: [a, b]}
- {method: squeeze, adapters: merged, rank: 8}
"""


def command(name: str) -> Command:
    found = cli.get_command(CONTEXT, name)
    assert isinstance(found, Command)
    return found


def page(name: str) -> list[str]:
    done = typed(name, "--help")
    assert (done.code, done.err) == (0, "")
    return done.out.splitlines()


def headings(lines: list[str]) -> list[str]:
    return [line.rstrip(":") for line in lines if line.endswith(":") and not line.startswith(" ")]


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    """A directory with everything the examples name."""
    for name in ("a", "my-adapter"):
        bare("sh3_rev", tmp_path / name / "adapter_model.safetensors")
    bare("sort_inter", tmp_path / "b" / "adapter_model.safetensors")
    bare("sh3_rev", tmp_path / "a.safetensors")
    bare("sort_inter", tmp_path / "b.safetensors")
    bare("sh3_rev", tmp_path / "my-dora" / "adapter_model.safetensors")
    for name in ("my-model", "my-tuned-model"):
        shutil.copytree(BASE, tmp_path / name)
    tuned = tmp_path / "my-tuned-model" / "model.safetensors"
    weights = load_file(tuned)
    weights["model.layers.0.self_attn.q_proj.weight"] *= 2
    save_file(weights, tuned)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    typed("cat", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "merged")
    return tmp_path


def test_the_main_page_names_every_command_under_a_heading() -> None:
    lines = typed("--help").out.splitlines()
    made = ["Merge (many adapters to one)", "Compress (one adapter)"]
    last = ["Examples", "Completion (bash, zsh, fish)"]
    assert headings(lines) == ["Options", *made, *written(), *last]
    listed = [line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "]
    assert set(NAMES) <= set(listed)


def test_the_main_page_says_of_each_command_what_its_own_page_says() -> None:
    text = " ".join(" ".join(typed("--help").out.split()).split())
    for name in NAMES:
        assert f"{name} {command(name).short_help or command(name).help}" in text


def test_no_words_is_a_question_for_help() -> None:
    done = typed()
    assert (done.code, done.out) == (2, "")
    assert done.err == typed("--help").out


@pytest.mark.parametrize("name", NAMES)
def test_every_help_page_ends_with_an_example(name: str) -> None:
    lines = page(name)
    assert lines[-2:] == ["Example:", f"  {command(name).example}"]
    assert lines[-1].split()[:2] == ["loramerge", name]


# Commands of the Hub run against a server of our own, in tests/hub.
@pytest.mark.parametrize("name", [name for name in NAMES if name not in written()["Hub"]])
def test_the_example_of_every_help_page_works(name: str, adapters: Path) -> None:
    lines = page(name)
    done = shell(lines[-1].strip(), adapters)
    assert done.code == 0, done.err


@pytest.mark.parametrize("name", [name for name in NAMES if name not in written()["Hub"]])
def test_every_command_prints_one_json_object_and_is_quiet_when_asked(
    name: str, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(adapters)
    words = shlex.split(command(name).example)[1:]
    done = typed(*words, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["schema_version"] == SCHEMA_VERSION
    if any(param.name == "quiet" for param in command(name).params):
        again = [] if name in READS else ["--force"]
        done = typed(*words, *again, "-q")
        assert (done.code, done.err) == (0, "")
        assert done.out


@pytest.mark.parametrize("name", NAMES)
def test_help_lists_a_methods_own_options_first_and_the_shared_groups_in_order(name: str) -> None:
    found = headings(page(name))[:-1]
    order = [
        f"Options of {name}",
        "Rank of the result",
        "Merge",
        "Input",
        "Output",
        "Computing",
        "Other",
    ]
    assert found == [heading for heading in order if heading in found]
    assert set(found) <= set(order)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_says_what_it_does_and_stands_on_its_page(name: str) -> None:
    lines = page(name)
    for param in command(name).params:
        if isinstance(param, click.Option) and not param.hidden:
            assert param.help
            assert param.help[0] not in " [", f"{param.name} has no sentence"
            assert any(max(param.opts, key=len) in line[:40] for line in lines)


@pytest.mark.parametrize("name", NAMES)
def test_a_flag_is_the_same_in_every_command_that_takes_it(name: str) -> None:
    for param in command(name).params:
        flag = max(param.opts, key=len)
        if isinstance(param, Flag) and flag in SHARED:
            same = ("opts", "metavar", "multiple", "is_flag", "group")
            same = same if (name, flag) in SAID else (*same, "help")
            theirs = [getattr(SHARED[flag], fact) for fact in same]
            assert [getattr(param, fact) for fact in same] == theirs, flag


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("columns", ["80", "200"])
def test_help_is_never_wider_than_100_columns(name: str, columns: str) -> None:
    lines = typed(name, "--help", env={"COLUMNS": columns}).out.splitlines()
    assert max(map(len, lines)) <= min(int(columns), 100)


@pytest.mark.parametrize("name", NAMES)
def test_help_keeps_no_indentation_of_the_source(name: str) -> None:
    lines = page(name)
    first = next(number for number, line in enumerate(lines) if line.endswith(":"))
    prose = [line for line in lines[1:first] if line]
    assert prose
    assert all(line.startswith("  ") and "   " not in line for line in prose)


def test_a_preset_says_what_it_is_equal_to() -> None:
    for name in NAMES:
        if name in WRITTEN:
            continue
        method, preset = find(name)
        if preset:
            text = " ".join(page(name))
            assert f"The same as `loramerge {method.name}" in text
            assert f"= {method.name}" in typed("methods").out


def test_cat_is_arithmetic_at_full_rank(adapters: Path) -> None:
    first = shell("loramerge cat a b -q -o one.safetensors", adapters)
    second = shell("loramerge arithmetic --rank full a b -q -o two.safetensors", adapters)
    assert (first.code, second.code) == (0, 0)
    one, two = adapters / "one.safetensors", adapters / "two.safetensors"
    assert one.read_bytes() == two.read_bytes()


def test_the_version_is_the_packages() -> None:
    from loramerge import __version__

    assert typed("--version").out == f"loramerge, version {__version__}\n"
