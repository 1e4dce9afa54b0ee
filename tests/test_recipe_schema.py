"""The JSON Schema that editors check recipes by: what it accepts runs, what it refuses does not."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

import loramerge as lm
from loramerge.io._yaml import Value, read_yaml
from loramerge.options import describe
from loramerge.recipe import find, fixed, options_of
from loramerge.registry import methods
from loramerge.schema import recipe_schema
from loramerge.workflow import make_workflow
from tests.build import write_peft
from tests.conftest import factors
from tests.test_api import bytes_of
from tests.test_method_options import bad_values, good_values
from tests.test_recipes import THREE
from tests.typed import ROOT, typed

SCHEMA = Draft7Validator(recipe_schema())
PAGE = (ROOT / "docs" / "recipes.md").read_text()
NAMES = [*methods(), *(preset.name for m in methods().values() for preset in m.presets)]


def fits(document: Value) -> bool:
    return bool(SCHEMA.is_valid(document))


def recipe(name: str, **values: Any) -> dict[str, Value]:
    return {"method": name, "adapters": ["a", {"reference": "b", "weight": -1}], **values}


def test_the_schema_is_one() -> None:
    Draft7Validator.check_schema(recipe_schema())


def test_the_command_prints_the_schema_of_the_docs() -> None:
    assert typed("run", "--schema").out == (ROOT / "docs" / "recipe.schema.json").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_every_good_value_of_every_option_fits(name: str) -> None:
    method, preset = find(name)
    for option in options_of(method):
        for value in good_values(option):
            taken = option.name not in fixed(preset)
            values = [value] if option.repeated and not isinstance(value, tuple) else value
            if isinstance(values, tuple):
                values = list(values)
            if values not in (method.scale, method.rank_option) or option.name == "k":
                assert fits(recipe(name, **{option.key: values})) == taken, (option.name, values)


@pytest.mark.parametrize("name", methods())
def test_no_bad_value_of_any_option_fits(name: str) -> None:
    for option in describe(methods()[name].options):
        for value in bad_values(option):
            if isinstance(value, float) and not abs(value) < float("inf"):
                continue  # JSON has no such numbers
            assert not fits(recipe(name, **{option.key: value})), (option.name, value)


@pytest.mark.parametrize(
    "text",
    [
        "method: ties",
        "adapters: [a]",
        "method: tis\nadapters: [a]",
        "method: ties\nadapters: []",
        "method: ties\nadapters: [a]\ndensety: 1",
        "method: squeeze\nadapters: a\nlambda: 1",
        "method: ties\nadapters: [{reference: a, wieght: 1}]",
        "method: cat\nadapters: [a]\nrank: 2",
        "steps: []",
        f"{THREE}rank: 8",
        THREE.replace("rank: 8", "rank: 8\n    output: 3"),
        THREE.replace("rank: 8", "rank: 8\n    base_model: x"),
        THREE.replace("name: merged", "name: a/b"),
    ],
)
def test_what_a_recipe_may_not_say_does_not_fit(text: str) -> None:
    assert not fits(read_yaml(text, "x"))


def test_a_recipe_of_steps_fits() -> None:
    assert fits(read_yaml(THREE, "x"))
    assert fits(read_yaml(THREE.replace("rank: 8", "rank: 8\n    output: x"), "x"))
    assert fits(read_yaml("method: dare\nadapters: a\ninclude: '*q*'\nsize: 3\noutput: x", "x"))


@pytest.fixture
def example(tmp_path: Path, rng: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the recipe of the docs and its adapters."""
    for name in ("a", "b", "c.safetensors"):
        write_peft(tmp_path / name, factors(rng, 4))
    text = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert text
    (tmp_path / "recipe.yaml").write_text(text[1])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_example_of_the_docs_fits_and_runs_as_it_is_typed(example: Path) -> None:
    assert fits(read_yaml((example / "recipe.yaml").read_text(), "x"))
    lines = re.search(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    assert lines
    for line in lines[1].splitlines():
        done = typed(*line.split()[1:])
        assert done.code == 0, done.err
    assert bytes_of(example / "pruned") == bytes_of(example / "again")
    assert (example / "other" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("number", "outputs"), [(1, ["merged-mlx"]), (2, ["out/merged", "out/r8", "out/r4"])]
)
def test_the_other_examples_of_the_docs_fit_and_run(
    example: Path, number: int, outputs: list[str]
) -> None:
    text = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[number]
    assert fits(read_yaml(text, "x"))
    (example / "other.yaml").write_text(text)
    assert typed("run", "other.yaml", "-q").out.split() == outputs


def test_the_python_of_the_docs_writes_the_bytes_of_its_recipe(example: Path) -> None:
    typed("run", "recipe.yaml", "-o", "ran")
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert code
    exec(code[1], {"loramerge": lm})
    assert bytes_of(example / "pruned") == bytes_of(example / "ran")


def test_the_error_of_the_docs_is_what_is_printed(example: Path) -> None:
    text = (example / "recipe.yaml").read_text()
    wrong = text.replace("density: 0.3", "densety: 0.3").replace("0.99", "2")
    (example / "recipe.yaml").write_text(wrong)
    printed = re.search(r"```text\n(.*?)```", PAGE, re.DOTALL)
    assert printed
    assert " ".join(printed[1].split()) in " ".join(typed("run", "recipe.yaml").err.split())


def test_a_key_of_another_document_is_no_recipe() -> None:
    facts = json.loads('{"peft_type": "LORA", "r": 8}')
    assert not fits(facts)
    with pytest.raises(lm.errors.UsageError):
        make_workflow(facts, "adapter_config.json")
