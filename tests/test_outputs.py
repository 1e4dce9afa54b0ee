"""Where results go: default names, existing outputs, --force, batches, dry runs, interruptions."""

import json
import os
from pathlib import Path

import pytest

from loramerge.io._source import Source
from tests.typed import bare, merged, shell, tree, typed

COMPUTING = ["arithmetic", "cluster", "squeeze"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["squeeze", "a", "-r", "2"], "a-r2"),
        (["squeeze", "a", "--energy", "0.9"], "a-e0.9"),
        (["squeeze", "a", "--max-error", "0.1", "--save-dtype", "float32"], "a-err0.1"),
        (["squeeze", "a", "--size", "20kB"], "a-20kB"),
        (["cluster", "a", "b", "-k", "3"], "a+b-k3"),
        (["cluster", "a", "b"], "a+b-k4"),
        (["arithmetic", "a", "c"], "a+c-arithmetic-r6"),
        (["cat", "a", "c"], "a+c-arithmetic-full"),
        (["select", "a", "--ranks", "0-1"], "a-select-r2"),
        (["scale", "a", "--factor", "0.5"], "a-scale-r4"),
        (["project", "a", "b"], "a+b-project-r4"),
    ],
)
def test_default_names_say_inputs_and_ranks(words: list[str], name: str, three: list[Path]) -> None:
    assert typed(*words, "-q").out == f"{name}\n"
    assert (Path(name) / "adapter_config.json").is_file()


def test_a_quiet_squeeze_of_this_directory_prints_only_the_path(
    three: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(three[0])
    done = typed("squeeze", "-r", "2", "-q")
    assert (done.code, done.out, done.err) == (0, "a-r2\n", "")


def test_more_than_three_inputs_are_named_by_a_fingerprint(three: list[Path]) -> None:
    first = typed("cluster", "a", "b", "c", "a", "-k", "3", "-q").out
    assert first.startswith("cluster-4-")
    assert first.endswith("-k3\n")
    assert typed("cluster", "a", "b", "c", "b", "-k", "3", "-q").out != first


def test_an_output_that_ends_in_safetensors_is_one_file(three: list[Path], here: Path) -> None:
    assert merged("-o", "out.safetensors", "-q").out == "out.safetensors\n"
    assert (here / "out.safetensors").is_file()


def test_an_existing_output_is_refused_and_force_replaces_it(three: list[Path]) -> None:
    assert merged("-o", "out").code == 0
    before = (Path("out") / "adapter_model.safetensors").read_bytes()
    again = merged("-o", "out", "--lambda", "2")
    assert again.code == 1
    assert again.lines[0] == "error: out exists."
    assert "--force" in again.lines[1]
    assert (Path("out") / "adapter_model.safetensors").read_bytes() == before
    assert merged("-o", "out", "--lambda", "2", "-f").code == 0
    assert (Path("out") / "adapter_model.safetensors").read_bytes() != before


@pytest.mark.parametrize("out", ["a", "./b/", "x.safetensors", "."])
def test_an_output_equal_to_an_input_is_refused_even_with_force(
    out: str, three: list[Path], here: Path
) -> None:
    bare("sh3_rev", here / "x.safetensors")
    before = tree(here)
    words = ["squeeze", "x.safetensors", "-r", "2"] if out.startswith("x") else ["cat", "a", "b"]
    done = typed(*words, "-o", out, "--force")
    assert done.code == 1
    assert "would replace the input" in done.err
    assert tree(here) == before


@pytest.mark.parametrize("name", COMPUTING)
def test_a_dry_run_reads_no_tensor_and_writes_nothing(
    name: str, three: list[Path], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touched(self: Source, key: str) -> bytes:
        raise AssertionError(f"{key} was read")

    monkeypatch.setattr(Source, "read", touched)
    before = tree(here)
    words = ["squeeze", "a", "-r", "2"] if name == "squeeze" else [name, "a", "b"]
    done = typed(*words, "--dry-run")
    assert (done.code, done.out.count("\n")) == (0, 1)
    assert "nothing was computed or written" in done.err
    facts = json.loads(typed(*words, "--dry-run", "--json").out)
    assert [m["shape"] for m in facts["modules"]] == [[24, 24], [40, 24], [24, 40]]
    assert tree(here) == before


def test_a_dry_run_foretells_bytes_and_ranks(three: list[Path]) -> None:
    plan = json.loads(merged("--rank", "full", "--dry-run", "--json").out)
    report = json.loads(merged("--rank", "full", "--json").out)
    written = Path(report["output"]) / "adapter_model.safetensors"
    assert plan["write_bytes"] == written.stat().st_size
    assert plan["output"] == report["output"]
    assert plan["rank"] == report["rank"][1] == 8


def test_a_dry_run_announces_that_delta_weights_are_formed(three: list[Path]) -> None:
    words = ("ties", "a", "b", "--dry-run", "--space", "dense")
    done = typed(*words)
    assert "forms  every delta weight, the largest in 3.84 kB for each thread" in done.err
    assert json.loads(typed(*words, "--json").out)["delta_bytes"] == 40 * 24 * 4
    double = typed(*words, "--json", "--compute-dtype", "float64").out
    assert json.loads(double)["delta_bytes"] == 40 * 24 * 8
    assert json.loads(typed(*words[:4], "--json").out)["delta_bytes"] == 0


def test_a_dry_run_gives_bounds_where_ranks_depend_on_the_weights(three: list[Path]) -> None:
    plan = json.loads(typed("squeeze", "a", "--energy", "0.5", "--dry-run", "--json").out)
    assert (plan["rank"], plan["rank_is_bound"], plan["passes"]) == (4, True, 2)
    assert "at most 4" in typed("squeeze", "a", "--energy", "0.5", "--dry-run").err


def test_several_adapters_are_squeezed_into_an_out_dir(three: list[Path]) -> None:
    done = typed("squeeze", "a", "b", "-r", "2", "--out-dir", "small", "-q")
    assert (done.code, done.out) == (0, "small/a-r2\nsmall/b-r2\n")
    facts = json.loads(typed("squeeze", "a", "b", "-r", "2", "--out-dir", "s2", "--json").out)
    assert [one["output"] for one in facts["results"]] == ["s2/a-r2", "s2/b-r2"]


def test_a_batch_with_a_bad_member_writes_nothing_at_all(three: list[Path], here: Path) -> None:
    (here / "b" / "adapter_model.safetensors").write_bytes(b"")
    done = typed("squeeze", "a", "b", "-r", "2", "--out-dir", "small")
    assert done.code == 1
    assert not (here / "small").exists()


def test_ctrl_c_ends_with_130_and_leaves_nothing(
    three: list[Path], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*anything: object) -> None:
        raise KeyboardInterrupt

    before = tree(here)
    monkeypatch.setattr("loramerge.output.Output.emit", interrupted)
    done = merged()
    assert (done.code, done.out) == (130, "")
    assert tree(here) == before


def test_a_gate_that_is_not_met_ends_with_3_and_leaves_nothing(
    three: list[Path], here: Path
) -> None:
    before = tree(here)
    done = typed("squeeze", "a", "--max-error", "1e-9", "--save-dtype", "bfloat16")
    assert done.code == 3
    assert done.lines[0].startswith("error: --max-error 1e-09 is out of reach")
    assert done.lines[1].startswith("hint: ")
    assert tree(here) == before


def test_a_path_that_is_no_text_is_printed_as_the_system_spells_it(
    three: list[Path], here: Path
) -> None:
    name = os.fsdecode(b"\xff-odd")
    (here / "a").rename(here / name)
    done = shell("loramerge squeeze *-odd -r 2 -q | od -An -tx1 -N1", here)
    assert (done.code, done.out.strip(), done.err) == (0, "ff", "")
