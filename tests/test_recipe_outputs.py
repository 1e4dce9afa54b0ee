"""Recipes that write several of their results: the files of as many commands, each on its own."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import loramerge as lm
from tests.build import write_kohya
from tests.conftest import factors
from tests.test_api import bytes_of
from tests.typed import tree, typed

# A merge that is kept, and two results made of it.
KEPT = """
steps:
  - {name: sum, method: ties, adapters: [a, b], rank: 8, output: kept/merged}
  - {method: squeeze, adapters: sum, rank: 3, output: small}
  - {method: prune, adapters: sum, threshold: 0.2}
output: pruned
"""
COMMANDS = (
    "ties a b --rank 8 -o kept/merged",
    "squeeze kept/merged -r 3 -o small",
    "prune kept/merged --threshold 0.2 -o pruned",
)
OUTPUTS = ("kept/merged", "small", "pruned")


@pytest.fixture(autouse=True)
def here(three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the adapters a, b, c and a recipe of three outputs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(KEPT)
    return tmp_path


def contents(place: Path) -> dict[str, bytes]:
    """Every file of a result, or what is in its directory of results."""
    if place.is_file():
        return {place.name: place.read_bytes()}
    return {str(f.relative_to(place)): f.read_bytes() for f in place.rglob("*") if f.is_file()}


def test_every_output_has_the_bytes_of_its_command(here: Path) -> None:
    done = typed("run", "r.yaml", "-q")
    assert (done.code, done.out.split()) == (0, list(OUTPUTS)), done.err
    found = [bytes_of(here / output) for output in OUTPUTS]
    for output in OUTPUTS:
        shutil.rmtree(output)
    for line in COMMANDS:
        assert typed(*line.split()).code == 0
    assert found == [bytes_of(here / output) for output in OUTPUTS]


def test_each_output_records_its_own_way_and_is_reproduced(here: Path) -> None:
    assert typed("run", "r.yaml").code == 0
    for output, steps in zip(
        OUTPUTS, (["ties"], ["squeeze", "ties"], ["prune", "ties"]), strict=True
    ):
        record = json.loads((here / output / "loramerge.json").read_text())
        told = []
        while record:
            told.append(record["recipe"]["method"])
            record = record["sources"][0]["made"]
        assert told == steps
        again = typed("reproduce", output, "-o", "again")
        assert "bit for bit" in again.err
        assert bytes_of(here / "again") == bytes_of(here / output)
        shutil.rmtree("again")


def test_a_result_is_reproduced_where_the_output_it_was_made_of_is_gone(here: Path) -> None:
    assert typed("run", "r.yaml").code == 0
    shutil.rmtree("kept")
    assert "bit for bit" in typed("reproduce", "small").err


def test_reports_tell_every_output_and_json_names_it(here: Path) -> None:
    shown = typed("run", "r.yaml")
    assert shown.out.split() == list(OUTPUTS)
    assert shown.err.count("re-read and verified") == 3
    assert "for the next step" not in shown.err
    facts = json.loads(typed("run", "r.yaml", "--json", "-f").out)
    assert [one["output"] for one in (*facts["steps"], facts)] == list(OUTPUTS)


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_a_dry_run_shows_every_output_and_writes_nothing(
    here: Path, words: tuple[str, ...]
) -> None:
    before = tree(here)
    done = typed("run", "r.yaml", "--dry-run", *words)
    assert (done.code, tree(here)) == (0, before), done.err
    if words:
        facts = json.loads(done.out)
        assert [one["output"] for one in (*facts["steps"], facts)] == list(OUTPUTS)
    else:
        assert done.out.split() == list(OUTPUTS)


def test_out_is_for_the_last_and_set_for_any(here: Path) -> None:
    done = typed("run", "r.yaml", "-q", "-o", "x", "--set", "steps[0].output=y.safetensors")
    assert done.out.split() == ["y.safetensors", "small", "x"], done.err


def test_a_step_takes_the_one_file_that_an_earlier_one_wrote(here: Path) -> None:
    assert typed("run", "r.yaml", "--set", "steps[0].output=y.safetensors").code == 0
    found = contents(here / "small")
    assert typed("squeeze", "y.safetensors", "-r", "3", "-o", "small", "-f").code == 0
    assert found == contents(here / "small")


@pytest.mark.parametrize("output", ["y", "y.safetensors"])
def test_a_plan_says_of_a_written_step_what_the_run_says(here: Path, output: str) -> None:
    for name, base in (("a", "org/x"), ("b", "org/x"), ("c", "org/y")):
        config = here / name / "adapter_config.json"
        facts = json.loads(config.read_text())
        config.write_text(json.dumps({**facts, "base_model_name_or_path": base}))
    changed = ("--set", "steps[1].method=tsv", "--set", "steps[1].adapters=[sum, c]")
    words = ("run", "r.yaml", *changed, "--set", f"steps[0].output={output}", "--json")
    planned, done = json.loads(typed(*words, "--dry-run").out), json.loads(typed(*words).out)
    told = [one["notes"] for one in (*planned["steps"], planned)]
    assert told == [one["notes"] for one in (*done["steps"], done)]
    assert any("org/x, org/y" in note for note in told[1])


def test_a_conversion_between_steps_can_be_written(here: Path) -> None:
    text = KEPT.replace("squeeze, adapters: sum, rank: 3", "convert, adapters: sum, to: mlx")
    (here / "r.yaml").write_text(text.replace("{method: convert", "{name: m, method: convert"))
    done = typed("run", "r.yaml", "-q", "--set", "steps[2].adapters=m")
    assert done.out.split() == list(OUTPUTS), done.err
    found = bytes_of(here / "pruned")
    assert typed("convert", "kept/merged", "--to", "mlx", "-o", "small", "-f").code == 0
    assert typed("prune", "small", "--threshold", "0.2", "-o", "pruned", "-f").code == 0
    assert found == bytes_of(here / "pruned")


def test_steps_of_one_file_layouts_have_the_bytes_of_commands_and_of_python(
    here: Path, rng: np.random.Generator
) -> None:
    for name in "xy":
        A, B = factors(rng, 4)["layers.0.q_proj"]
        write_kohya(here / f"{name}.safetensors", {"lora_unet_q": (A, B, 2)})
    (here / "r.yaml").write_text(
        "steps:\n- {name: m, method: ties, adapters: [x.safetensors, y.safetensors], rank: 4}\n"
        "- {method: squeeze, adapters: m, rank: 2}\noutput: out.safetensors\n"
    )
    assert typed("run", "r.yaml").code == 0
    found = contents(here / "out.safetensors")
    assert typed("ties", "x.safetensors", "y.safetensors", "--rank", "4").code == 0
    line = ("squeeze", "x+y-ties-r4.safetensors", "-r", "2", "-o", "out.safetensors", "-f")
    assert typed(*line).code == 0
    assert found == contents(here / "out.safetensors")
    merged, _ = lm.ties(["x.safetensors", "y.safetensors"], rank=4)
    small, _ = lm.squeeze(merged, rank=2)
    assert found == contents(small.save("out.safetensors", force=True))


@pytest.mark.parametrize(
    ("assigned", "said"),
    [
        ("steps[0].output=pruned", "several results would be written to pruned."),
        ("steps[0].output=./pruned", "several results would be written to pruned."),
        ("steps[1].output=kept/merged/x", "kept/merged/x lies in kept/merged, which is another"),
        ("steps[0].output=small/x/y", "small/x/y lies in small, which is another result."),
        ("steps[0].output=pruned/x.safetensors", "pruned/x.safetensors lies in pruned"),
        ("steps[1].output=b", "b would replace the input b."),
        ("steps[2].output=b", "$.output is for the last step, which has an output"),
    ],
)
@pytest.mark.parametrize("forced", [(), ("-f",)])
def test_outputs_in_each_others_place_are_refused_before_anything_is_computed(
    here: Path, assigned: str, said: str, forced: tuple[str, ...]
) -> None:
    before = tree(here)
    done = typed("run", "r.yaml", "--set", assigned, *forced)
    assert done.code in (1, 2)
    assert said in done.lines[0]
    assert tree(here) == before


def test_a_default_name_replaces_no_adapter_of_an_earlier_step(here: Path) -> None:
    shutil.copytree("b", "merged-r3")
    (here / "r.yaml").write_text(
        "steps:\n- {name: s, method: cat, adapters: [a, merged-r3], output: merged}\n"
        "- {method: squeeze, adapters: s, rank: 3}\n"
    )
    done = typed("run", "r.yaml", "-f")
    assert (done.code, done.out) == (1, "")
    assert done.lines[0] == "error: merged-r3 would replace the input merged-r3."


@pytest.mark.parametrize("output", OUTPUTS)
def test_an_output_that_exists_is_refused_before_anything_is_computed(
    here: Path, output: str
) -> None:
    shutil.copytree("c", output)
    before = tree(here)
    done = typed("run", "r.yaml")
    assert (done.code, done.lines[0]) == (1, f"error: {output} exists.")
    assert tree(here) == before
    assert typed("run", "r.yaml", "-f").code == 0
    assert (here / output / "loramerge.json").is_file()


def test_a_default_name_that_is_known_at_the_end_replaces_no_output(here: Path) -> None:
    (here / "r.yaml").write_text(
        "steps:\n- {name: s, method: squeeze, adapters: a, energy: 0.5}\n"
        "- {method: select, adapters: b, ranks: 0, output: other}\n"
        "- {method: squeeze, adapters: s, rank: 9}\n"
    )
    planned = typed("run", "r.yaml", "-q", "--dry-run").out.split()
    _, name = typed("run", "r.yaml", "-q").out.split()
    assert name not in planned
    done = typed("run", "r.yaml", "-q", "-f", "--set", f"steps[1].output={name}")
    assert (done.code, done.out) == (2, f"{name}\n")
    assert done.lines[0] == f"error: several results would be written to {name}."
    assert json.loads((here / name / "loramerge.json").read_text())["recipe"]["method"] == "select"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("output: small", "output: 3", "$.steps[1].output is 3; it must be text."),
        ("output: small", "output: ''", "$.steps[1].output is ''; it must be text."),
        (", output: small", "", "$.steps[1] has no name for a later step to take its result."),
        ("output: small", "name: x", "$.steps[1] is used by no later step as 'x'."),
        ("prune, adapters: sum", "prune, adapters: kept/merged", "where an earlier step writes."),
        ("0.2}", "0.2, output: x}", "$.output is for the last step, which has an output."),
    ],
)
def test_what_an_output_may_not_be_is_told_by_its_path(
    here: Path, old: str, new: str, said: str
) -> None:
    assert KEPT.count(old) == 1
    (here / "r.yaml").write_text(KEPT.replace(old, new))
    done = typed("run", "r.yaml")
    assert done.code == 2
    assert done.lines[0].endswith(said)
