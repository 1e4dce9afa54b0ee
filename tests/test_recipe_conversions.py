"""Conversions as steps of recipes: the bytes of the command and of Python, and every mistake."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from jsonschema import Draft7Validator

import loramerge as lm
from loramerge.cli import written as commands_written
from loramerge.errors import UsageError
from loramerge.io._yaml import read_yaml
from loramerge.options import describe
from loramerge.recipe import Named
from loramerge.schema import recipe_schema
from loramerge.translation import ConvertOptions, make_translation
from loramerge.workflow import OF_FILE, OF_STEP, make_workflow
from tests.build import write_peft
from tests.conftest import factors
from tests.test_api import bytes_of
from tests.typed import tree, typed

SCHEMA = Draft7Validator(recipe_schema())
MERGED = """
steps:
  - {name: merged, method: ties, adapters: [a, b], rank: 8, density: 0.5}
  - {method: convert, adapters: merged, to: TO}
"""
BETWEEN = """
steps:
  - {name: there, method: convert, adapters: a, to: TO}
  - {method: squeeze, adapters: there, rank: 2}
"""


# Of Stable Diffusion's UNet, so that most layouts have names for them.
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
NAMES = (f"{BLOCK}.attn1.to_q", f"{BLOCK}.ff.net.0.proj", f"{BLOCK}.ff.net.2")


@pytest.fixture(autouse=True)
def here(rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the adapters a, b, c, and a in one file whose alpha nothing says."""
    for name in ("a", "b", "c", "bare.safetensors"):
        pairs = dict(zip(NAMES, factors(rng, 4).values(), strict=True))
        write_peft(tmp_path / name, pairs, lora_alpha=8)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(place: Path) -> dict[str, bytes] | bytes:
    return bytes_of(place) if place.is_dir() else place.read_bytes()


def ran(text: str, *words: str) -> Path:
    Path("r.yaml").write_text(text)
    done = typed("run", "r.yaml", "-q", *words)
    assert (done.code, done.err) == (0, "")
    return Path(done.out.strip())


@pytest.mark.parametrize("to", ["kohya", "mlx", "peft"])
def test_a_merge_that_is_converted_has_the_bytes_of_commands_and_python(
    here: Path, to: str
) -> None:
    found = ran(MERGED.replace("TO", to))
    expected = written(found)
    shutil.move(found, "ran")
    assert typed("ties", "a", "b", "-r", "8", "--density", "0.5").code == 0
    assert typed("convert", "a+b-ties-r8", "--to", to, "-q").out == f"{found}\n"
    assert written(found) == expected
    merged, _ = lm.ties(["a", "b"], rank=8, density=0.5)
    done = lm.convert(merged, to, out=f"python{found.suffix}")
    assert written(done.path) == expected


@pytest.mark.parametrize("to", ["kohya", "mlx", "peft"])
def test_a_conversion_between_steps_has_the_bytes_of_commands(here: Path, to: str) -> None:
    ran(BETWEEN.replace("TO", to), "-o", "ran")
    between = typed("convert", "a", "--to", to, "-q").out.strip()
    assert typed("squeeze", between, "-r", "2", "-o", "typed").code == 0
    assert bytes_of(here / "ran") == bytes_of(here / "typed")


LINES = [
    "convert a --to kohya",
    "convert a --to mlx --rename down_blocks.=blocks. -o out",
    "convert a --to peft --from peft --extras drop -o out.safetensors",
    "convert a --to peft --initial c -o out",
]


def check_saved(line: str) -> None:
    """Hold the recipe that a command saves to what the command writes, and to the schema."""
    first = typed(*line.split(), "--save-recipe", "saved.yaml", "-q")
    assert first.code == 0, first.err
    place = Path(first.out.strip())
    before = written(place)
    again = typed("run", "saved.yaml", "-q", "-f")
    assert (again.code, again.out) == (0, first.out), again.err
    assert written(place) == before
    assert SCHEMA.is_valid(read_yaml(Path("saved.yaml").read_text(), "x"))


@pytest.mark.parametrize("line", LINES)
def test_a_saved_recipe_writes_the_bytes_of_its_command(line: str) -> None:
    check_saved(line)


def test_the_recipe_of_a_result_makes_its_bytes(here: Path) -> None:
    found = ran(MERGED.replace("TO", "kohya"))
    assert typed("reproduce", found, "--save-recipe", "way.yaml").code == 0
    assert typed("run", "way.yaml", "-o", "again.safetensors").code == 0
    assert written(found) == written(here / "again.safetensors")


def test_a_saved_recipe_says_what_was_typed_and_nothing_else(here: Path) -> None:
    words = ("--heads", "4", "--alpha", "6", "--dry-run")
    line = ("convert", "bare.safetensors", "--to", "mlx", *words)
    assert typed(*line, "--save-recipe", "s.yaml").code == 0
    assert read_yaml((here / "s.yaml").read_text(), "x") == {
        "method": "convert",
        "adapters": [{"reference": "bare.safetensors", "alpha": 6.0}],
        "to": "mlx",
        "heads": "4",
    }


def test_a_start_that_is_read_otherwise_cannot_be_saved(here: Path) -> None:
    words = ("--initial", "a", "--alpha", "6", "--alpha", "8", "--save-recipe", "s.yaml")
    done = typed("convert", "bare.safetensors", "--to", "peft", *words)
    assert done.code == 2
    assert "reads what --initial names as it reads the adapter" in done.lines[0]
    assert not (here / "s.yaml").exists()


@pytest.mark.parametrize("text", [MERGED, BETWEEN, "method: convert\nadapters: a\nto: TO"])
@pytest.mark.parametrize("to", ["kohya", "mlx"])
def test_a_dry_run_plans_what_is_done_then_and_writes_nothing(
    here: Path, text: str, to: str
) -> None:
    (here / "r.yaml").write_text(text.replace("TO", to))
    before = tree(here)
    facts = json.loads(typed("run", "r.yaml", "--dry-run", "--json").out)
    shown = typed("run", "r.yaml", "--dry-run")
    assert "nothing was computed or written" in shown.err
    assert tree(here) == before
    done = json.loads(typed("run", "r.yaml", "--json").out)
    assert shown.out == f"{facts['output']}\n"
    assert facts["output"] == done["output"]
    plans, reports = [*facts.get("steps", []), facts], [*done.get("steps", []), done]
    assert [one["recipe"] for one in plans] == [one["recipe"] for one in reports]


def test_a_conversion_between_steps_is_shown(here: Path) -> None:
    (here / "r.yaml").write_text(BETWEEN.replace("TO", "mlx"))
    said = typed("run", "r.yaml").err
    assert "peft -> mlx" in said
    assert "for the next step, in the layout mlx" in said


def test_no_output_replaces_an_adapter_of_any_step(here: Path) -> None:
    (here / "r.yaml").write_text(MERGED.replace("TO", "mlx"))
    done = typed("run", "r.yaml", "-o", "b", "-f")
    assert (done.code, done.lines[0]) == (1, "error: b would replace the input b.")
    done = typed("convert", "a", "--to", "peft", "--initial", "c", "-o", "c", "-f")
    assert (done.code, done.lines[0]) == (1, "error: c would replace the input c.")


def test_a_page_of_a_conversion_is_refused_before_anything_is_computed(here: Path) -> None:
    (here / "r.yaml").write_text(MERGED.replace("TO", "mlx"))
    before = tree(here)
    done = typed("run", "r.yaml", "--report", "r.html")
    assert done.code == 2
    assert "the last step is convert" in done.lines[0]
    assert tree(here) == before


def test_a_layout_that_does_not_fit_is_told_by_its_step(here: Path) -> None:
    (here / "r.yaml").write_text(MERGED.replace("TO", "bfl"))
    done = typed("run", "r.yaml")
    assert done.code == 1
    assert done.lines[0].startswith("error: step 2 (convert): ")


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("method: convrt\nadapters: a\nto: mlx", "$.method is 'convrt', no method", "'convert'"),
        ("method: convert\nadapters: a", "$: convert needs to know the layout", "--to mlx"),
        ("method: convert\nadapters: a\nto: kohja", "$.to is 'kohja', no layout", "'kohya'"),
        ("method: convert\nadapters: a\nto: 3", "$.to is '3', no layout", None),
        ("method: convert\nadapters: [a, b]\nto: mlx", "$: convert takes one adapter", None),
        ("method: convert\nadapters: a\nto: mlx\nextra: drop", "$.extra is no option", "'extras'"),
        ("method: convert\nadapters: a\nto: mlx\nrank: 2", "$.rank is no option of", "--help"),
        ("method: convert\nadapters: a\nto: mlx\nextras: x", "$.extras is 'x'; it must be", None),
        ("method: convert\nadapters: a\nto: mlx\nheads: x", "$.heads is 'x', no number", "32,8"),
        ("method: convert\nadapters: a\nto: mlx\nrename: x", "$.rename holds 'x'", "x=model."),
        (
            "method: convert\nto: mlx\nadapters: {reference: a, weight: 2}",
            "$.adapters[0].weight is nothing convert takes",
            None,
        ),
        (
            MERGED.replace("TO", "mlx, shared: c"),
            "$.steps[1].shared is for files; merged is the result of a step",
            None,
        ),
    ],
)
def test_a_mistake_is_told_by_its_path(text: str, message: str, hint: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        make_workflow(read_yaml(text, "r.yaml"), "r.yaml")
    assert message in caught.value.message
    assert hint is None or hint in str(caught.value.hint)


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("method: convert\nadapters: a\nto: mlx", True),
        ("method: convert\nadapters: a\nto: mlx\nrename: a=b\nheads: 32,8\nextras: drop", True),
        ("method: convert\nadapters: a\nto: mlx\npruned: [x, y]\noutput: out", True),
        (MERGED.replace("TO", "kohya"), True),
        (BETWEEN.replace("TO", "kohya"), True),
        ("method: convert\nadapters: a", False),
        ("method: convert\nadapters: a\nto: kohja", False),
        ("method: convert\nadapters: a\nto: mlx\nrank: 2", False),
        ("method: convert\nadapters: a\nto: mlx\nextras: first", False),
        ("method: convert\nadapters: a\nto: mlx\nrename: 3", False),
        (MERGED.replace("TO", "kohya, output: x"), True),
    ],
)
def test_the_schema_takes_what_runs(text: str, fits: bool) -> None:
    assert SCHEMA.is_valid(read_yaml(text, "x")) == fits


def without_recipes() -> list[str]:
    commands = {name: one for table in commands_written().values() for name, one in table.items()}
    flag = "--save-recipe"
    return [n for n, one in commands.items() if not any(flag in p.opts for p in one.params)]


@pytest.mark.parametrize("name", without_recipes())
def test_a_command_without_recipes_says_why_and_what_to_type_instead(here: Path, name: str) -> None:
    done = typed(name, "a", "--save-recipe", "s.yaml")
    assert (done.code, done.out) == (2, "")
    assert done.lines[0].startswith(f"error: {name} ")
    assert "recipe" in done.lines[0]
    shutil.copytree("a", "my-adapter")
    line = done.lines[1][done.lines[1].index("loramerge ") :].split()[1:]
    names = {"baked": "a", "extracted": "a"}
    again = typed(*(names.get(word, word) for word in line), "-q")
    assert again.code == 0, again.err
    assert Path("recipe.yaml").is_file()


def test_no_option_has_the_name_of_another_key() -> None:
    keys = {option.key for option in describe(ConvertOptions)}
    assert not keys & {*OF_STEP, *OF_FILE}


def test_a_start_is_read_as_the_adapter_is() -> None:
    made = make_translation([Named("a", alpha=8)], {"to": "peft", "initial": "c", "shared": "s"})
    assert made.adapters == (Named("a", alpha=8, shared="s"), Named("c", alpha=8, shared="s"))
