"""Recipes that run: the bytes of the command line and of Python, planned whole before the start."""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

import loramerge as lm
from loramerge.io._yaml import read_yaml
from tests.build import write_kohya, write_peft
from tests.conftest import factors
from tests.test_api import bytes_of
from tests.test_provenance import SECRET
from tests.typed import tree, typed

THREE = """
steps:
  - name: merged
    method: ties
    adapters: [a, {reference: b, weight: -0.5}, c]
    density: 0.6
    rank: 12
    save_dtype: float32
  - name: small
    method: squeeze
    adapters: merged
    energy: 0.95
  - method: prune
    adapters: small
    threshold: 0.2
    shrink: soft
"""
FINAL = "a+b+c-ties-r12-e0.95-prune"


@pytest.fixture(autouse=True)
def here(three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the adapters a, b, c and the recipe of three steps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(THREE)
    return tmp_path


def chained() -> None:
    """The three steps as three command lines."""
    merged = ("-w", "1", "-w", "-0.5", "-w", "1", "--density", "0.6", "--rank", "12")
    lines = [
        ("ties", "a", "b", "c", *merged, "--save-dtype", "float32"),
        ("squeeze", "a+b+c-ties-r12", "--energy", "0.95"),
        ("prune", "a+b+c-ties-r12-e0.95", "--threshold", "0.2", "--shrink", "soft"),
    ]
    for line in lines:
        done = typed(*line)
        assert done.code == 0, done.err


def test_yaml_flags_and_python_write_the_same_bytes(here: Path) -> None:
    assert typed("run", "r.yaml", "-o", "run").code == 0
    chained()
    merged, _ = lm.ties(
        ["a", "b", "c"], weights=[1, -0.5, 1], density=0.6, rank=12, save_dtype="float32"
    )
    small, _ = lm.squeeze(merged, energy=0.95)
    pruned, _ = lm.prune(small, threshold=0.2, shrink="soft")
    expected = bytes_of(here / "run")
    assert expected == bytes_of(here / FINAL)
    assert expected == bytes_of(pruned.save("python"))


def test_the_document_tells_every_step_back_to_the_adapters(here: Path) -> None:
    typed("run", "r.yaml", "-o", "run")
    facts = json.loads((here / "run" / "loramerge.json").read_text())
    (small,) = facts["sources"]
    (merged,) = small["made"]["sources"]
    assert facts["recipe"]["method"] == "prune"
    assert small["made"]["recipe"]["settings"]["energy"] == 0.95
    assert merged["made"]["recipe"]["weights"] == [1, -0.5, 1]
    assert [source["name"] for source in merged["made"]["sources"]] == ["a", "b", "c"]


def test_the_default_output_is_that_of_the_last_command(here: Path) -> None:
    done = typed("run", "r.yaml", "-q")
    assert (done.code, done.out, done.err) == (0, f"{FINAL}\n", "")
    assert sorted(path.name for path in here.iterdir()) == sorted([FINAL, "a", "b", "c", "r.yaml"])


def test_the_recipe_says_where_the_result_goes_and_out_says_otherwise(here: Path) -> None:
    (here / "r.yaml").write_text(THREE + "output: x.safetensors\n")
    assert typed("run", "r.yaml", "-q").out == "x.safetensors\n"
    assert typed("run", "r.yaml", "-q", "-o", "y").out == "y\n"


@pytest.mark.parametrize("kind", ["one", "three"])
def test_a_dry_run_plans_every_step_and_writes_nothing(here: Path, kind: str) -> None:
    if kind == "one":
        (here / "r.yaml").write_text("method: cat\nadapters: [a, b]\n")
    before = tree(here)
    facts = json.loads(typed("run", "r.yaml", "--dry-run", "--json").out)
    assert tree(here) == before
    done = json.loads(typed("run", "r.yaml", "--json").out)
    assert facts["output"] == done["output"]
    plans, reports = [*facts.get("steps", []), facts], [*done.get("steps", []), done]
    assert len(plans) == len(reports) == (1 if kind == "one" else 3)
    for planned, report in zip(plans, reports, strict=True):
        assert planned["recipe"] == report["recipe"]
        assert planned["rank"] >= report["rank"][1]


def test_a_step_says_what_it_is_kept_as(here: Path, rng: np.random.Generator) -> None:
    write_peft(here / "half", factors(rng, 4), dtype="bfloat16")
    (here / "r.yaml").write_text(THREE.replace("c]", "half]"))
    assert "for the next step, as float32\n" in typed("run", "r.yaml").err
    (here / "r.yaml").write_text(
        "steps:\n- {name: x, method: squeeze, rank: 3, adapters: half}\n"
        "- {method: squeeze, rank: 2, adapters: x}"
    )
    said = "for the next step, as bfloat16 (save_dtype: float32 keeps more)\n"
    assert said in typed("run", "r.yaml").err


def test_a_mistake_of_the_last_step_is_told_before_the_first_is_computed(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loramerge.result.compute_into", None)
    done = typed("run", "r.yaml", "--set", "steps[2].include=nothing*")
    assert done.code == 2
    assert done.lines[0].startswith("error: step 3 (prune): --include 'nothing*'")


def test_no_output_replaces_an_adapter_of_any_step(here: Path) -> None:
    done = typed("run", "r.yaml", "-o", "b", "-f")
    assert done.code == 1
    assert done.lines[0] == "error: b would replace the input b."


def test_a_step_goes_before_a_directory_of_its_name(here: Path) -> None:
    shutil.copytree(here / "c", here / "merged")
    assert typed("run", "r.yaml", "-o", "run").code == 0
    facts = json.loads((here / "run" / "loramerge.json").read_text())
    assert facts["sources"][0]["made"]["sources"][0]["name"] == "a+b+c-ties-r12"


def test_results_between_steps_are_gone_afterwards(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = here / "tmp"
    kept.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(kept))
    assert typed("run", "r.yaml").code == 0
    overflowing = (
        "--set",
        "steps[0].adapters[0].weight=1e16",
        "--set",
        "steps[1].save_dtype=float16",
    )
    assert typed("run", "r.yaml", *overflowing, "-f").code == 1
    assert list(kept.iterdir()) == []


def test_kohya_files_go_through_several_steps(here: Path, rng: np.random.Generator) -> None:
    for name in "xy":
        A, B = factors(rng, 4)["layers.0.q_proj"]
        write_kohya(here / f"{name}.safetensors", {"lora_unet_q": (A, B, 2)})
    text = THREE.replace("[a, {reference: b, weight: -0.5}, c]", "[x.safetensors, y.safetensors]")
    (here / "r.yaml").write_text(text)
    done = typed("run", "r.yaml", "-q")
    assert done.out == "x+y-ties-r8-e0.95-prune.safetensors\n", done.err


def test_adapters_for_another_base_model_than_the_recipes_are_refused(here: Path) -> None:
    config = here / "b" / "adapter_config.json"
    facts = json.loads(config.read_text())
    config.write_text(json.dumps({**facts, "base_model_name_or_path": "org/other"}))
    (here / "r.yaml").write_text(THREE + "base_model: org/base\n")
    done = typed("run", "r.yaml")
    assert done.code == 1
    assert "b is for org/other; the recipe says base_model: org/base." in done.err
    assert typed("run", "r.yaml", "--set", "base_model=org/other").code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("none.yaml",), "none.yaml cannot be read"),
        (("r.yaml", "--set", "steps[1].rank"), "--set steps[1].rank has no value"),
        (("r.yaml", "--set", "steps[1].rank=0"), "$.steps[1].rank is 0"),
        (("r.yaml", "--set", "x=[1"), "--set x, line 1: no YAML"),
        (("a",), "a cannot be read"),
    ],
)
def test_a_recipe_that_cannot_be_run_is_a_wrong_command(
    here: Path, words: tuple[str, ...], said: str
) -> None:
    done = typed("run", *words)
    assert done.code == 2
    assert said in done.err


LINES = [
    "cluster a b -k 3 --gauge raw --scale 0.5 --seed 7",
    "arithmetic a b -w 1 -w -0.5 --lambda 0.5 --include *q* --include *up* -r 3 -o out",
    "squeeze a --size 20kB --allocate sigma -o out.safetensors",
    "dare a b --density 0.5 --save-dtype bfloat16 --device cpu",
    "prune a --threshold 0.1 --absolute --layout uniform",
]


@pytest.mark.parametrize("line", LINES)
def test_a_saved_recipe_writes_the_bytes_of_its_command_line(here: Path, line: str) -> None:
    words = line.split()
    first = typed(*words, "--save-recipe", "saved.yaml", "-q")
    assert first.code == 0, first.err
    result = here / first.out.strip()
    before = bytes_of(result) if result.is_dir() else result.read_bytes()
    again = typed("run", "saved.yaml", "-q", "-f")
    assert (again.code, again.out) == (0, first.out), again.err
    assert before == (bytes_of(result) if result.is_dir() else result.read_bytes())


def test_a_saved_recipe_says_what_was_typed_and_nothing_else(here: Path) -> None:
    line = ("arithmetic", "./a", "b/adapter_model.safetensors", "-w", "1", "-w", "2", "-o", "out")
    env = {"LORAMERGE_ARITHMETIC_RANK": "3", "HF_TOKEN": SECRET, "USER": SECRET}
    assert typed(*line, "--save-recipe", "saved.yaml", env=env).code == 0
    text = (here / "saved.yaml").read_text()
    assert read_yaml(text, "x") == {
        "method": "arithmetic",
        "adapters": ["./a", {"reference": "b/adapter_model.safetensors", "weight": 2.0}],
        "rank": 3,
        "output": "out",
    }
    assert SECRET not in text
    assert str(here) not in text


def test_the_adapter_of_the_current_directory_is_saved_as_such(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here / "a")
    typed("squeeze", "-r", "2", "--save-recipe", "../saved.yaml", "--dry-run")
    assert read_yaml((here / "saved.yaml").read_text(), "x") == {
        "method": "squeeze",
        "adapters": ["."],
        "rank": 2,
    }


def test_a_recipe_with_values_set_can_be_saved(here: Path) -> None:
    words = ("--set", "steps[1].energy=0.5", "--set", "steps[0].adapters[0].weight=2")
    assert typed("run", "r.yaml", *words, "--save-recipe", "s.yaml", "--dry-run").code == 0
    saved = read_yaml((here / "s.yaml").read_text(), "x")
    assert isinstance(saved, dict)
    assert saved["steps"][1]["energy"] == 0.5
    assert saved["steps"][0]["adapters"][0] == {"reference": "a", "weight": 2}


def test_a_file_is_not_replaced_by_a_saved_recipe_unless_forced(here: Path) -> None:
    done = typed("cat", "a", "b", "--save-recipe", "r.yaml")
    assert (done.code, done.lines[0]) == (1, "error: r.yaml exists.")
    assert (here / "r.yaml").read_text() == THREE
    assert tree(here) == tree(here)
    assert typed("cat", "a", "b", "--save-recipe", "r.yaml", "-f").code == 0
