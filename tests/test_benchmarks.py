"""The benchmarks: seeded workloads, paired measurements, budgets that can be missed."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import loramerge as lm

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules in benchmarks/, which are scripts and no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> Any:
        return importlib.import_module(name)

    return load


def run(speed: Any, directory: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    out = directory / "out.json"
    code = speed.main(["--quick", "--data", str(directory), "--json", str(out), *arguments])
    return code, json.loads(out.read_text())


def with_budget(speed: Any, name: str, limit: float) -> tuple[Any, ...]:
    budget = speed.Budget("seconds", limit, limit)
    row = next(row for row in speed.ROWS if row.name == name)
    return (dataclasses.replace(row, budgets=(budget,)),)


def test_a_quick_run_reports_figures_of_our_command_and_its_floor(
    bench: Any, tmp_path: Path
) -> None:
    code, report = run(bench("speed"), tmp_path, "--only", "W1-arithmetic,help")
    assert code == 0
    assert report["schema_version"] == 1
    assert report["machine"]["cores"] >= 1
    assert report["machine"]["numpy"] == np.__version__
    merge, light = {row["name"]: row for row in report["rows"]}.values()
    assert (merge["adapters"], merge["layers"], merge["against"]) == (4, 1, "floor")
    ((ours, floor),) = merge["samples"]
    assert merge["figures"]["ratio"] == pytest.approx(ours[0] / floor[0])
    assert merge["figures"]["memory_gb"] == pytest.approx(ours[2] / 1e9)
    assert {budget["figure"] for budget in merge["budgets"]} == {"ratio", "memory_gb"}
    assert light["against"] is None
    assert len(light["samples"][0]) == 1


def test_a_method_is_timed_beside_the_sum_of_the_same_adapters(bench: Any, tmp_path: Path) -> None:
    speed = bench("speed")
    row = speed.promised("slerp", 3)
    inputs = [Path("a"), Path("b")]
    ours, beside = speed.ours(row, inputs, tmp_path), speed.counterpart(row, inputs, tmp_path)
    assert [[word if word != "slerp" else "arithmetic" for word in ours[0]]] == beside
    (found,) = run(speed, tmp_path, "--only", row.name)[1]["rows"]
    assert (found["adapters"], found["against"]) == (2, "sum")
    assert found["figures"]["ratio"] == found["samples"][0][0][0] / found["samples"][0][1][0]


def test_a_budget_out_of_reach_is_shown_as_missed_and_fails_only_if_asked_to(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    speed = bench("speed")
    monkeypatch.setattr(speed, "ROWS", with_budget(speed, "help", 0.0))
    code, report = run(speed, tmp_path)
    assert (code, report["missed"]) == (0, ["help"])
    assert [budget["met"] for budget in report["rows"][0]["budgets"]] == [False]
    assert "MISSED" in capsys.readouterr().out
    assert run(speed, tmp_path, "--strict")[0] == 1


def test_a_budget_with_room_is_met(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = bench("speed")
    monkeypatch.setattr(speed, "ROWS", with_budget(speed, "help", 1e6))
    code, report = run(speed, tmp_path, "--strict")
    assert (code, report["missed"]) == (0, [])


def test_a_speedup_is_a_least_value(bench: Any) -> None:
    speed = bench("speed")
    judged = speed.judge(speed.Budget("speedup", 6, 10), {"speedup": 7.0})
    assert (judged["met"], judged["goal_met"]) == (True, False)


def test_a_row_that_is_not_run_says_why(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    speed = bench("speed")
    slow = next(row for row in speed.ROWS if row.slow)
    monkeypatch.setattr(speed, "ROWS", (slow,))
    _, report = run(speed, tmp_path)
    assert report["rows"] == [{"name": slow.name, "skipped": report["rows"][0]["skipped"]}]
    assert f"--only {slow.name}" in capsys.readouterr().out


def test_a_command_that_fails_stops_the_benchmark(bench: Any, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="exit code 3"):
        bench("processes").Place(tmp_path).run([sys.executable, "-c", "raise SystemExit(3)"])


def test_peak_memory_is_that_of_the_child(bench: Any, tmp_path: Path) -> None:
    place = bench("processes").Place(tmp_path)
    size = 300_000_000
    code = f"x = b'x' * {size}"
    assert place.run([sys.executable, "-c", code]).peak > size


def test_workloads_have_the_sizes_they_are_named_for(bench: Any) -> None:
    workloads = bench("workloads")
    found = {}
    for name, workload in workloads.WORKLOADS.items():
        layers = workload.layers(32)
        sides = sum(one.in_features * one.kernel**2 + one.out_features for one in layers)
        found[name] = (len(layers), sum(one.kernel > 1 for one in layers), sides * workload.rank)
    assert found == {
        "llama8b": (224, 0, 41_943_040),
        "sdxl": (722 + 34, 34, 95_580_160),
        "small": (12, 0, 147_456),
    }


@pytest.mark.parametrize("name", ["llama8b", "sdxl", "small"])
def test_a_workload_is_the_same_in_every_run(bench: Any, tmp_path: Path, name: str) -> None:
    make = bench("workloads").make
    alone = make(name, tmp_path / "one", 1, layers=1)[0]
    among = make(name, tmp_path / "two", 2, layers=1)[0]
    assert content(alone) == content(among)


def content(path: Path) -> bytes:
    return (path / "adapter_model.safetensors" if path.is_dir() else path).read_bytes()


def test_workload_files_are_what_the_safetensors_library_reads(bench: Any, tmp_path: Path) -> None:
    (path,) = bench("workloads").make("sdxl", tmp_path, 1, layers=1)
    stored = load_file(path)
    convolution = next(key for key, value in stored.items() if value.shape[2:] == (3, 3))
    stem = convolution.removesuffix(".lora_down.weight")
    assert stored[f"{stem}.lora_up.weight"].shape[1:] == (32, 1, 1)
    assert float(stored[f"{stem}.alpha"]) == 16
    with safe_open(path, "np") as file:
        assert file.metadata()["ss_network_dim"] == "32"


def test_workload_adapters_share_a_part_of_their_directions(bench: Any, tmp_path: Path) -> None:
    a, b = bench("workloads").make("llama8b", tmp_path, 2, layers=1)
    merged, report = lm.arithmetic([a, b], rank="full", include=["*q_proj"])
    (module,) = report.modules
    one, _ = lm.arithmetic([a], rank="full", include=["*q_proj"])
    single = one.adapter.read(module.name)
    norm = np.linalg.norm(single.B.astype(np.float64) @ single.A)
    # Half of the directions' energy is common on either side, so that a quarter is in the product;
    # random directions in 4096 dimensions differ from that by about 1 / 64 each.
    cosine = module.target / norm**2 / 2 - 1
    assert cosine == pytest.approx(0.25, abs=0.05)
    assert merged.adapter.modules[module.name].rank == 32
