"""Options from the environment, LORAMERGE_<COMMAND>_<OPTION>, and completion in the shell."""

import json
from pathlib import Path

import pytest

from loramerge.cli import cli
from loramerge.cli.command import Command, variable
from tests.typed import merged, shell, typed


@pytest.fixture(autouse=True)
def here(three: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory of the adapters a, b, c."""
    monkeypatch.chdir(three[0].parent)


def test_an_option_can_come_from_the_environment_and_is_said() -> None:
    done = typed("squeeze", "a", env={"LORAMERGE_SQUEEZE_RANK": "2"})
    assert (done.code, done.out) == (0, "a-r2\n")
    assert done.lines[0] == "--rank 2 from LORAMERGE_SQUEEZE_RANK"


def test_what_is_typed_beats_the_environment() -> None:
    env = {"LORAMERGE_SQUEEZE_RANK": "2"}
    assert typed("squeeze", "a", "-r", "3", "-q", env=env).out == "a-r3\n"
    assert typed("squeeze", "a", "--energy", "0.9", "-q", env=env).out == "a-e0.9\n"


def test_switches_and_repeated_options_come_from_the_environment_too() -> None:
    env = {"LORAMERGE_ARITHMETIC_QUIET": "1", "LORAMERGE_ARITHMETIC_WEIGHT": "1 -0.5"}
    done = merged(env=env)
    assert (done.code, done.err) == (0, "")
    recipe = json.loads((Path(done.out.strip()) / "loramerge.json").read_text())["recipe"]
    assert recipe["weights"] == [1.0, -0.5]


@pytest.mark.parametrize(
    ("variable", "hint"),
    [
        ("LORAMERGE_SQUEEZE_RNAK", "did you mean LORAMERGE_SQUEEZE_RANK?"),
        ("LORAMERGE_SQUEEZE_XYZZY", "unset LORAMERGE_SQUEEZE_XYZZY"),
    ],
)
def test_a_variable_that_stands_for_no_option_is_refused(variable: str, hint: str) -> None:
    done = typed("squeeze", "a", "-r", "2", env={variable: "8"})
    assert (done.code, done.out) == (2, "")
    assert done.lines == [
        f"error: {variable} is set, and stands for no option of squeeze.",
        f"hint: {hint}",
    ]
    assert typed("inspect", "a", env={variable: "8"}).code == 0


def test_no_variable_stands_for_two_options() -> None:
    context = cli.make_context("loramerge", ["--help"], resilient_parsing=True)
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert isinstance(command, Command)
        options = [param for param in command.params if hasattr(param, "group")]
        names = [variable(name, option) for option in options]
        assert len(names) == len(set(names)) > 0


def test_every_command_says_what_the_environment_set() -> None:
    done = typed("diff", "a", "a", env={"LORAMERGE_DIFF_FAIL_ABOVE": "0.5"})
    assert (done.code, done.lines) == (0, ["--fail-above 0.5 from LORAMERGE_DIFF_FAIL_ABOVE"])
    env = {"LORAMERGE_COMPARE_RANK": "2", "LORAMERGE_COMPARE_METHODS": "cat,ties"}
    done = typed("compare", "a", "b", "--methods", "ties", "--energy", "0.5", "--json", env=env)
    assert (done.code, done.err) == (0, "")
    (row,) = json.loads(done.out)["methods"]
    assert (row["recipe"]["settings"]["rank"], row["recipe"]["settings"]["energy"]) == (None, 0.5)


def test_the_shell_completes_commands_options_and_words() -> None:
    def complete(words: str) -> list[str]:
        env = {
            "_LORAMERGE_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split(" ")) - 1),
        }
        found = shell("loramerge", Path(), env).out.split()
        return [item.removeprefix("plain,") for item in found]

    assert complete("loramerge clu") == ["cluster"]
    assert complete("loramerge cluster --gau") == ["--gauge"]
    assert complete("loramerge cluster --gauge ") == ["svd", "balanced", "raw"]
    assert complete("loramerge cluster --rank m") == ["max"]
    assert complete("loramerge cluster --to ko") == ["kohya"]
    assert complete("loramerge convert a --to ko") == ["kohya"]
    assert complete("loramerge inspect a --from a") == ["auto", "adalora"]
    assert complete("loramerge verify a --for peft,sg") == ["peft,sglang"]
    assert complete("loramerge compare a b --methods ties,da") == ["ties,dare"]
    assert complete("loramerge compare a b --methods p") == []  # project is no merge


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_each_shell_gets_a_script_that_asks_for_words(name: str) -> None:
    done = shell("loramerge", Path(), {"_LORAMERGE_COMPLETE": f"{name}_source"})
    assert f"_LORAMERGE_COMPLETE={name}_complete" in done.out.replace("env ", "")
