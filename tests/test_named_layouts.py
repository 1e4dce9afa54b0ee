"""--from: the layout is named instead of told from the keys, in every way in, and recorded."""

import json
from pathlib import Path

import numpy as np
import pytest

import loramerge as lm
from loramerge.cli import cli
from loramerge.cli.command import Command
from tests.build import write_kohya, write_peft
from tests.conftest import factors
from tests.typed import typed

RECIPE = """
method: cat
adapters:
  - {reference: one.safetensors, from: lycoris}
  - two.safetensors
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> Path:
    """A directory with two kohya files, whose keys lycoris explains too, and the PEFT directory a.

    Told from the keys they are kohya's.
    """
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        A, B = factors(rng, 4)["layers.0.q_proj"]
        write_kohya(tmp_path / f"{name}.safetensors", {"lora_unet_q": (A, B, 2)})
    write_peft(tmp_path / "a", factors(rng, 4))
    return tmp_path


def layouts_read(path: Path) -> list[str]:
    """The layouts that the record in a file's header says its sources were read in."""
    record = json.loads(lm.load(path).metadata["loramerge"])
    return [source["layout"] for source in record["sources"]]


def test_flags_a_recipe_and_python_read_the_same_layouts_and_write_the_same_bytes(
    here: Path,
) -> None:
    said = ("--from", "lycoris", "--from", "auto", "--to", "kohya")
    files = ("one.safetensors", "two.safetensors")
    done = typed("cat", *files, *said, "-o", "flags.safetensors", "--save-recipe", "saved.yaml")
    assert done.code == 0, done.err
    (here / "recipe.yaml").write_text(f"{RECIPE}to: kohya\n")
    for recipe in ("recipe", "saved"):
        done = typed("run", f"{recipe}.yaml", "-o", f"{recipe}.safetensors")
        assert done.code == 0, done.err
    adapters = [lm.load(files[0], layout="lycoris"), lm.load(files[1])]
    lm.cat(adapters, to="kohya")[0].save("python.safetensors")
    found = {
        (here / f"{way}.safetensors").read_bytes() for way in ("flags", "recipe", "saved", "python")
    }
    assert len(found) == 1
    assert layouts_read(here / "flags.safetensors") == ["lycoris", "kohya"]


def test_one_layout_is_that_of_every_adapter(here: Path) -> None:
    files = ("one.safetensors", "two.safetensors")
    assert typed("cat", *files, "--from", "lycoris", "-o", "out.safetensors").code == 0
    assert layouts_read(here / "out.safetensors") == ["lycoris"] * 2


def test_a_result_is_made_again_from_sources_read_as_they_were(here: Path) -> None:
    assert typed("cat", "one.safetensors", "--from", "lycoris", "-o", "out.safetensors").code == 0
    done = typed("reproduce", "out.safetensors", "-o", "again.safetensors")
    assert done.code == 0, done.err
    assert layouts_read(here / "again.safetensors") == ["lycoris"]
    assert (here / "again.safetensors").read_bytes() == (here / "out.safetensors").read_bytes()


READERS = {
    "bake": ["a", "--base", "a"],
    "convert": ["a", "--to", "kohya"],
    "compare": ["a"],
    "diff": ["a", "a"],
    "inspect": ["a"],
    "similar": ["a", "a"],
    "split": ["a", "--every", "1"],
    "verify": ["a"],
}
# What reads adapters of its own finding, full models, or none.
OTHERS = {"env", "extract", "layouts", "methods", "pull", "push", "reproduce", "run"}
CONTEXT = cli.make_context("loramerge", ["--help"], resilient_parsing=True)


@pytest.mark.parametrize("name", sorted(set(cli.list_commands(CONTEXT)) - OTHERS))
def test_every_command_that_reads_adapters_takes_the_layout(name: str, here: Path) -> None:
    words = READERS.get(name)
    if words is None:
        command = cli.get_command(CONTEXT, name)
        assert isinstance(command, Command)
        words = command.example.split()[2:]
        words = ["a" if word in ("b", "my-adapter") else word for word in words]
        words = [word for word in words if not word.endswith(".safetensors")]
        words = words if "a" in words else ["a", "a", *words]
    done = typed(name, *words, "--from", "mlx")
    assert (done.code, done.out) == (1, ""), done.err
    assert "not in the mlx layout" in done.err
    done = typed(name, *words, "--from", "mxl")
    assert (done.code, done.out) == (2, ""), done.err
    assert "There is no layout 'mxl'" in done.err
    assert "did you mean 'mlx'?" in done.err


def test_the_second_adapter_of_a_command_can_be_in_another_layout(here: Path) -> None:
    assert typed("convert", "a", "--to", "mlx", "-o", "mlx").code == 0
    for word, more in (("diff", "mlx"), ("verify", "--against=mlx")):
        done = typed(word, "a", more, "--from", "peft", "--from", "mlx")
        assert done.code == 0, done.err
