"""Steps of recipes that read a base model: the bytes of bake --rank and extract, every mistake."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from jsonschema import Draft7Validator
from safetensors.numpy import save_file

import loramerge as lm
from loramerge.errors import UsageError
from loramerge.io._yaml import read_yaml
from loramerge.options import describe
from loramerge.schema import recipe_schema
from loramerge.steps import KINDS
from loramerge.workflow import OF_FILE, OF_STEP, make_workflow
from tests.build import write_peft
from tests.conftest import factors
from tests.test_api import bytes_of
from tests.test_recipe_conversions import check_saved, ran
from tests.typed import tree, typed

SCHEMA = Draft7Validator(recipe_schema())
BAKED = """
steps:
  - {name: plain, method: bake, adapters: dora, base: base, rank: 6}
  - {method: ties, adapters: [plain, a], rank: 4}
"""
EXTRACTED = """
steps:
  - {name: found, method: extract, base: base, tuned: tuned, rank: 5, save_dtype: float16}
  - {name: both, method: arithmetic, adapters: [found, a], rank: 4}
  - {method: convert, adapters: both, to: mlx}
"""


@pytest.fixture(autouse=True)
def here(
    three: list[Path], rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Adapters a, b, c, one of them also as a DoRA, and two versions of their model."""
    monkeypatch.chdir(tmp_path)
    modules = lm.load("a").modules
    magnitudes = {
        f"base_model.model.{name}.lora_magnitude_vector": np.abs(
            rng.standard_normal(module.out_features)
        ).astype("f4")
        for name, module in modules.items()
    }
    write_peft(tmp_path / "dora", factors(rng, 4), extras=magnitudes, use_dora=True)
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        weights = {
            f"{key}.weight": rng.standard_normal(module.shape).astype("f4")
            for key, module in modules.items()
        }
        save_file(weights, tmp_path / name / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (BAKED, ["bake dora --base base --rank 6", "ties dora-r6 a -r 4"]),
        (
            EXTRACTED,
            [
                "extract base tuned --rank 5 --save-dtype float16",
                "arithmetic tuned-lora-r5 a -r 4",
                "convert tuned-lora-r5+a-arithmetic-r4 --to mlx",
            ],
        ),
    ],
)
def test_steps_have_the_bytes_of_commands_one_after_another(
    here: Path, text: str, lines: list[str]
) -> None:
    found = ran(text)
    expected = bytes_of(found)
    shutil.move(found, "ran")
    for line in lines:
        done = typed(*line.split(), "-q")
        assert done.code == 0, done.err
    assert done.out == f"{found}\n"
    assert bytes_of(found) == expected


LINES = [
    "bake dora --base base -r 3 --save-dtype float16 -o out",
    "bake a --base base -r 3",
    "extract base tuned -r 2",
    "extract base tuned -r 2 --save-dtype bfloat16 -o out",
]


@pytest.mark.parametrize("line", LINES)
def test_a_saved_recipe_writes_the_bytes_of_its_command(line: str) -> None:
    check_saved(line)


def test_full_weights_have_no_recipe(here: Path) -> None:
    done = typed("bake", "a", "--base", "base", "--save-recipe", "s.yaml")
    assert (done.code, done.lines) == (
        2,
        [
            "error: bake without --rank writes a model, and the steps of a recipe make adapters.",
            "hint: add --rank 16, or type bake without a recipe",
        ],
    )
    assert not (here / "s.yaml").exists()


@pytest.mark.parametrize("text", [BAKED, EXTRACTED])
def test_a_dry_run_plans_what_is_done_then_and_writes_nothing(here: Path, text: str) -> None:
    (here / "r.yaml").write_text(text)
    before = tree(here)
    planned = json.loads(typed("run", "r.yaml", "--dry-run", "--json").out)
    assert tree(here) == before
    done = json.loads(typed("run", "r.yaml", "--json").out)
    assert planned["output"] == done["output"]
    plans, reports = [*planned["steps"], planned], [*done["steps"], done]
    assert [one["recipe"] for one in plans] == [one["recipe"] for one in reports]


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("method: extrakt\nbase: a", "$.method is 'extrakt', no method", "'extract'"),
        ("method: bake\nadapters: a\nrank: 2", "$: bake needs to know the base model", None),
        ("method: bake\nadapters: a\nbase: base", "$: bake without --rank writes a model", None),
        ("method: bake\nadapters: [a, b]\nbase: x\nrank: 2", "$: bake takes one adapter", None),
        ("method: bake\nadapters: a\nbase: x\nrank: 0", "$.rank is 0; it must be", None),
        ("method: bake\nadapters: a\nbasse: x\nrank: 2", "$.basse is no option", "'base'"),
        ("method: extract\nbase: x\ntuned: y", "$: extract needs base and tuned", "--rank 32"),
        ("method: extract\nadapters: a\nbase: x\ntuned: y\nrank: 2", "takes no adapters", None),
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
        (BAKED, True),
        (EXTRACTED, True),
        ("method: extract\nbase: x\ntuned: y\nrank: 2\noutput: z", True),
        ("method: extract\nadapters: a\nbase: x\ntuned: y\nrank: 2", False),
        ("method: extract\nbase: x\nrank: 2", False),
        ("method: bake\nadapters: a\nbase: x", False),
        ("method: bake\nadapters: a\nbase: x\nrank: 0", False),
        ("method: bake\nbase: x\nrank: 2", False),
    ],
)
def test_the_schema_takes_what_runs(text: str, fits: bool) -> None:
    assert SCHEMA.is_valid(read_yaml(text, "x")) == fits


@pytest.mark.parametrize("name", KINDS)
def test_no_option_has_the_name_of_another_key(name: str) -> None:
    keys = {option.key for option in describe(KINDS[name].options)}
    assert not keys & {*OF_STEP, *OF_FILE}
