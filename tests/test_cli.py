"""The rules every command follows: stdout and stderr, -q, --json, names, environment, dry runs."""

import json
from pathlib import Path

import numpy as np
import pytest

from loramerge.cli import ui
from loramerge.compute import FLOOR, encode
from loramerge.io._source import decode
from tests.build import write_peft
from tests.typed import merged, shell, typed


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_stdout_is_the_output_path_and_stderr_is_the_report(three: list[Path]) -> None:
    done = merged()
    assert (done.code, done.out) == (0, "a+b-arithmetic-r4\n")
    assert Path(done.out.strip()).is_dir()
    labels = [line[: line.index("  ", len(line) - len(line.lstrip()))] for line in done.lines]
    assert [label.strip() for label in labels] == [
        "method",
        "adapters",
        "modules",
        "rank",
        "retained energy",
        "relative error",
        "rounding",
        "scale",
        "written",
        "took",
    ]


def test_quiet_prints_the_path_and_nothing_else(three: list[Path]) -> None:
    done = merged("-q")
    assert (done.code, done.out, done.err) == (0, "a+b-arithmetic-r4\n", "")


def test_a_quiet_result_feeds_the_next_command(three: list[Path], here: Path) -> None:
    done = shell("out=$(loramerge squeeze a -r 2 -q) && loramerge inspect $out --json", here)
    assert (done.code, json.loads(done.out)["ranks"]) == (0, {"2": 3})


def test_json_is_one_object_on_stdout_with_its_schema_version(three: list[Path]) -> None:
    done = merged("--json")
    facts = json.loads(done.out)
    assert (done.code, done.err, done.out.count("\n")) == (0, "", 1)
    assert facts["schema_version"] == 1
    assert facts["output"] == "a+b-arithmetic-r4"
    assert facts["scale_assumed"] is False
    assert {"relative_error", "retained_energy", "median_error", "rank", "notes"} <= set(facts)


@pytest.mark.parametrize("words", ["inspect a", "diff a b", "methods", "layouts", "env"])
def test_every_look_command_speaks_json_with_a_schema_version(
    words: str, three: list[Path]
) -> None:
    done = typed(*words.split(), "--json")
    facts = json.loads(done.out)
    assert (done.code, done.err, facts["schema_version"]) == (0, "", 1)


def test_several_inspected_adapters_are_one_json_object(three: list[Path]) -> None:
    facts = json.loads(typed("inspect", "a", "c", "--json").out)
    assert [one["ranks"] for one in facts["adapters"]] == [{"4": 3}, {"6": 3}]


def test_an_assumed_scale_is_the_last_line_and_stands_in_json(
    rng: np.random.Generator, here: Path
) -> None:
    pair = (rng.standard_normal((4, 8)), rng.standard_normal((8, 4)))
    write_peft(here / "x.safetensors", {"lin": pair})
    done = typed("squeeze", "x.safetensors", "-r", "2")
    last = "assumed  scale 1: x.safetensors does not say its alpha (--alpha N sets it)"
    assert done.lines[-1].strip() == last
    asked = typed("squeeze", "x.safetensors", "-r", "2", "-f", "--json")
    assert json.loads(asked.out)["scale_assumed"] is True
    assert asked.lines == [last]


def test_a_stated_alpha_is_believed_and_nothing_is_assumed(
    rng: np.random.Generator, here: Path
) -> None:
    pair = (rng.standard_normal((4, 8)), rng.standard_normal((8, 4)))
    write_peft(here / "x.safetensors", {"lin": pair})
    done = typed("squeeze", "x.safetensors", "-r", "2", "--alpha", "8")
    assert "assumed" not in done.err
    assert json.loads(typed("inspect", "x-r2", "--json").out)["scale_assumed"] is False


def test_the_report_says_what_was_padded_and_what_counts_as_zero(
    rng: np.random.Generator, here: Path
) -> None:
    def pair(rank: int) -> tuple[np.ndarray, np.ndarray]:
        return rng.standard_normal((rank, 8)), rng.standard_normal((8, rank))

    write_peft(here / "a", {"x": pair(2), "y": pair(2)})
    write_peft(here / "b", {"x": pair(3)}, r=3)
    notes = json.loads(merged("--rank", "full", "--json").out)["notes"]
    assert any("not in every adapter and count as zero there: y" in note for note in notes)
    assert any("zero-padded to the stored rank (exact): 1 of 2 modules" in note for note in notes)


def test_the_report_says_what_the_papers_own_scale_would_have_been(three: list[Path]) -> None:
    # Two adapters of rank 4 in 16 clusters, of which 8 exist: sqrt(4 / 8).
    facts = json.loads(typed("cluster", "a", "b", "-k", "16", "--json").out)
    assert facts["scale"]["others"]["paper"] == pytest.approx(0.5**0.5)


@pytest.mark.parametrize("scale", ["paper", "auto", "norm", "ls", "0.5"])
def test_lambda_counts_under_every_scale(scale: str, three: list[Path]) -> None:
    def norm(factor: str) -> float:
        words = ("-o", f"out{factor}", "--scale", scale, "--lambda", factor, "-q", "-f")
        assert merged(*words).code == 0
        facts = json.loads((Path(f"out{factor}") / "adapter_config.json").read_text())
        assert facts["lora_alpha"] == facts["r"]
        weights = stored(f"out{factor}/adapter_model.safetensors")
        return sum(
            float(np.linalg.norm(weights[k.replace("lora_A", "lora_B")] @ weights[k]) ** 2)
            for k in weights
            if "lora_A" in k
        )

    assert norm("2") == pytest.approx(4 * norm("1"), rel=1e-5)  # float32 factors


def stored(path: str) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return {key: value.astype(np.float64) for key, value in load_file(path).items()}


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_the_rounding_floor_is_what_random_factors_lose(
    dtype: str, rng: np.random.Generator
) -> None:
    def rounded(x: np.ndarray) -> np.ndarray:
        return decode(encode(x, dtype).tobytes(), dtype, "").reshape(x.shape).astype(np.float64)

    found = []
    for rank, m, n in ((1, 256, 256), (8, 512, 512), (16, 1024, 256), (64, 512, 768)):
        A, B = rng.standard_normal((rank, n)), rng.standard_normal((m, rank))
        found.append(np.linalg.norm(rounded(B) @ rounded(A) - B @ A) / np.linalg.norm(B @ A))
    # 5 %: the spread over seeds and shapes.
    assert FLOOR[dtype] == pytest.approx(np.median(found), rel=0.05)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (556_904, "557 kB"),
        (999_600, "1 MB"),
        (83_900_000, "83.9 MB"),
        (2_500_000_000, "2.50 GB"),
    ],
)
def test_sizes_are_told_in_the_unit_that_fits(count: int, text: str) -> None:
    assert ui.in_bytes(count) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.5, "50.00 %"),
        (0.9909, "99.09 %"),
        (0.99999, "99.999 %"),
        (0.999999, "99.9999 %"),
        (1 - 1e-9, "100 %"),
        (1.0, "100 %"),
    ],
)
def test_retained_energy_is_never_rounded_up_to_all_of_it(share: float, text: str) -> None:
    assert ui.percent(share) == text


def test_a_closed_pipe_is_no_traceback(three: list[Path], here: Path) -> None:
    done = shell("loramerge inspect a b c a b c --modules | head -n 1", here)
    assert done.err == ""


def test_a_defect_is_one_line_and_a_traceback_only_when_asked_for(
    three: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*anything: object) -> None:
        raise ZeroDivisionError("one over none")

    monkeypatch.setattr("loramerge.publish.run", broken)
    done = merged()
    assert (done.code, len(done.lines)) == (1, 2)
    assert "this is a defect of loramerge (ZeroDivisionError: one over none)" in done.err
    with pytest.raises(ZeroDivisionError):
        merged(env={"LORAMERGE_DEBUG": "1"})
