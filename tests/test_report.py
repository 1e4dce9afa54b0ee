"""The numbers of a report, against dense float64 matrices made from the file as written."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import loramerge as lm
from loramerge.adapter import LowRank
from loramerge.errors import GateError, IncompatibleError, LoramergeError
from loramerge.output import terms
from loramerge.report import Report
from tests.build import Pair, write_kohya, write_peft

PREFIX = "base_model.model."
Deltas = dict[str, np.ndarray]
# The report rounds nothing; its squared norms are good to 1e-2 where terms cancel.
CANCELLED = 1e-2
PLAIN = 1e-5
# Weights are folded in float32, 4e-8 of the sum, against a rounding of 3e-4 (float16) and more.
FOLDED = 1e-3


def pairs(rng: np.random.Generator, rank: int, modules: int = 3) -> dict[str, Pair]:
    return {
        f"layers.{i}.proj": (
            rng.standard_normal((rank, 40)).astype(np.float32),
            rng.standard_normal((32, rank)).astype(np.float32),
        )
        for i in range(modules)
    }


def dense(factors: Mapping[str, Pair], scale: float = 1.0) -> Deltas:
    return {n: scale * B.astype(float) @ A.astype(float) for n, (A, B) in factors.items()}


def stored(file: Path) -> Deltas:
    """What the file holds, by the safetensors library; lora_alpha equals the rank in ours."""
    tensors = {key: tensor.double().numpy() for key, tensor in load_file(file).items()}
    found = {}
    for key, A in tensors.items():
        if key.endswith(".lora_A.weight"):
            B = tensors[key.replace("lora_A", "lora_B")]
            found[key.removeprefix(PREFIX).removesuffix(".lora_A.weight")] = B @ A
    return found


def check(report: Report, file: Path, wanted: Deltas, tolerance: float) -> None:
    """Every error of the report is that of the file."""
    found = stored(file)
    gaps = {n: float(np.linalg.norm(found[n] - wanted[n])) for n in wanted}
    norms = {n: float(np.linalg.norm(wanted[n])) for n in wanted}
    errors = {n: gaps[n] / norms[n] for n in wanted}
    assert {m.name: m.relative_error for m in report.modules} == pytest.approx(
        errors, rel=tolerance
    )
    whole = math.hypot(*gaps.values()) / math.hypot(*norms.values())
    assert report.relative_error == pytest.approx(whole, rel=tolerance)
    assert report.median_error == pytest.approx(np.median([*errors.values()]), rel=tolerance)
    assert report.worst.name == max(errors, key=lambda name: errors[name])


def saved(result: "lm.Result", path: Path) -> Path:
    return result.save(path / "out.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_error_of_a_cut_sum_is_that_of_the_file(
    rng: np.random.Generator, tmp_path: Path, dtype: str
) -> None:
    one, two = pairs(rng, 4), pairs(rng, 6)
    a, b = write_peft(tmp_path / "a", one, lora_alpha=8), write_peft(tmp_path / "b", two)
    result, report = lm.arithmetic([a, b], weights=[1, -0.5], rank=3, save_dtype=dtype)
    first, second = dense(one, 2.0), dense(two)
    wanted = {name: first[name] - 0.5 * second[name] for name in first}
    check(report, saved(result, tmp_path), wanted, PLAIN)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rank", ["full", 8])
def test_the_error_of_rounding_alone_is_that_of_the_file(
    rng: np.random.Generator, tmp_path: Path, dtype: str, rank: str | int
) -> None:
    one, two = pairs(rng, 3), pairs(rng, 5)
    a = write_peft(tmp_path / "a", one, lora_alpha=7)
    b = write_peft(tmp_path / "b", two, lora_alpha=11)
    result, report = lm.arithmetic([a, b], weights=[0.3, -0.7], rank=rank, save_dtype=dtype)
    first, second = dense(one, 7 / 3), dense(two, 11 / 5)
    wanted = {name: 0.3 * first[name] - 0.7 * second[name] for name in first}
    check(report, saved(result, tmp_path), wanted, FOLDED)


@pytest.mark.parametrize("tail", [1e-1, 1e-2, 1e-3, 1e-5, 1e-6])
def test_a_tiny_error_is_that_of_the_file(
    rng: np.random.Generator, tmp_path: Path, tail: float
) -> None:
    factors = pairs(rng, 5)
    for A, _ in factors.values():
        A[4] *= tail
    a = write_peft(tmp_path / "a", factors)
    result, report = lm.squeeze(a, rank=4)
    assert 0.1 * tail < report.relative_error < tail
    check(report, saved(result, tmp_path), dense(factors), CANCELLED)


@pytest.mark.parametrize("gap", [1e-1, 1e-3, 1e-5])
def test_the_error_of_a_difference_of_near_copies_is_that_of_the_file(
    rng: np.random.Generator, tmp_path: Path, gap: float
) -> None:
    one, noise = pairs(rng, 4), pairs(rng, 4)
    two = {n: (A, (B + gap * noise[n][1]).astype(np.float32)) for n, (A, B) in one.items()}
    a, b = write_peft(tmp_path / "a", one), write_peft(tmp_path / "b", two)
    result, report = lm.arithmetic([a, b], weights=[1, -1], rank=2)
    first, second = dense(one), dense(two)
    wanted = {name: first[name] - second[name] for name in first}
    check(report, saved(result, tmp_path), wanted, CANCELLED)


@pytest.mark.parametrize("scale", ["auto", "norm", "ls", 0.3])
def test_the_error_of_a_scaled_merge_is_that_of_the_file(
    rng: np.random.Generator, tmp_path: Path, scale: str | float
) -> None:
    one, two = pairs(rng, 4), pairs(rng, 4)
    a, b = write_peft(tmp_path / "a", one), write_peft(tmp_path / "b", two)
    result, report = lm.cluster([a, b], k=3, scale=scale)
    first, second = dense(one), dense(two)
    check(report, saved(result, tmp_path), {n: first[n] + second[n] for n in first}, PLAIN)


@pytest.mark.parametrize("flags", [{"rank": 3}, {"energy": 0.8}, {"rank": 2, "allocate": "sigma"}])
def test_the_energy_a_truncation_keeps_is_that_of_the_singular_values(
    rng: np.random.Generator, tmp_path: Path, flags: dict[str, object]
) -> None:
    factors = pairs(rng, 6)
    _, report = lm.squeeze(write_peft(tmp_path / "a", factors), **flags)
    squares = {n: np.linalg.svd(d, compute_uv=False) ** 2 for n, d in dense(factors).items()}
    kept = {m.name: squares[m.name][: m.rank].sum() for m in report.modules}
    total = {name: s.sum() for name, s in squares.items()}
    shares = {name: kept[name] / total[name] for name in squares}
    assert {m.name: m.energy for m in report.modules} == pytest.approx(shares, rel=PLAIN)
    whole = sum(kept.values()) / sum(total.values())
    assert report.energy == pytest.approx(whole, rel=PLAIN)


def test_of_a_truncation_the_squared_error_and_the_energy_add_up_to_one(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    _, report = lm.squeeze(write_peft(tmp_path / "a", pairs(rng, 6)), rank=3)
    for module in report.modules:
        assert module.relative_error**2 + module.energy == pytest.approx(1, rel=PLAIN)


@pytest.mark.parametrize("rank", ["full", "max", 2])
@pytest.mark.parametrize("scale", ["paper", "auto", "ls"])
def test_a_sum_of_zero_is_said_and_stays_zero(
    rng: np.random.Generator, tmp_path: Path, rank: str | int, scale: str
) -> None:
    a = write_peft(tmp_path / "a", pairs(rng, 4))
    result, report = lm.arithmetic([a, a], weights=[1, -1], rank=rank, scale=scale)
    assert "the weighted sum is zero in every module" in report.notes
    assert (report.relative_error, report.energy, report.scale) == (0, 1, 1)
    for delta in stored(saved(result, tmp_path)).values():
        assert np.linalg.norm(delta) < 1e-12


def test_modules_that_cancel_are_named_and_lose_their_ranks_to_an_energy_bound(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    one = pairs(rng, 4)
    two = one | {"layers.1.proj": pairs(rng, 4)["layers.1.proj"]}
    a, b = write_peft(tmp_path / "a", one), write_peft(tmp_path / "b", two)
    _, report = lm.arithmetic([a, b], weights=[1, -1], energy=0.99)
    assert "the weighted sum is zero in layers.0.proj, layers.2.proj" in report.notes
    assert [m.rank > 0 for m in report.modules] == [False, True, False]
    assert report.as_json()["modules_merged"] == 1


def test_a_bound_that_leaves_nothing_of_a_zero_sum_is_refused(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    a = write_peft(tmp_path / "a", pairs(rng, 4))
    with pytest.raises(IncompatibleError, match="the sum of the updates is zero"):
        lm.arithmetic([a, a], weights=[1, -1], energy=0.9)


def test_an_error_against_a_sum_of_zero_is_no_number(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    a = write_peft(tmp_path / "a", pairs(rng, 4))
    _, report = lm.cluster([a, a], weights=[1, -1], k=4)
    facts = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert (report.relative_error, report.energy) == (math.inf, 0)
    assert (facts["relative_error"], facts["median_error"]) == (None, None)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("letter", [0, 1])
@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("arithmetic", {"rank": "full"}),
        ("arithmetic", {"rank": 2}),
        ("arithmetic", {"scale": "auto"}),
        ("squeeze", {"rank": 2}),
        ("squeeze", {"energy": 0.9}),
        ("squeeze", {"rank": 2, "svd": "randomized"}),
        ("cluster", {"k": 3}),
        ("cluster", {"k": 99, "gauge": "balanced", "scale": "paper"}),
    ],
)
def test_nan_and_inf_are_refused_by_adapter_and_module(
    rng: np.random.Generator,
    tmp_path: Path,
    method: str,
    values: dict[str, object],
    letter: int,
    value: float,
) -> None:
    factors = pairs(rng, 4)
    factors["layers.1.proj"][letter][2, 3] = value
    bad = write_peft(tmp_path / "bad", factors)
    good = [] if method == "squeeze" else [write_peft(tmp_path / "good", pairs(rng, 4))]
    with pytest.raises(IncompatibleError, match=r"bad: layers\.1\.proj holds (NaN|Inf)"):
        lm.run(method, [*good, bad], **values)


def test_numbers_too_large_for_their_dtype_are_refused_by_module(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    a = write_peft(tmp_path / "a", pairs(rng, 4))
    with pytest.raises(IncompatibleError, match=r"layers\.\d\.proj overflows F16"):
        lm.arithmetic(a, weights=[1e12], rank="full", save_dtype="float16")


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_weights_too_large_to_compute_with_are_refused(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    a = write_peft(tmp_path / "a", pairs(rng, 4))
    with pytest.raises(LoramergeError, match=r"layers\.\d\.proj"):
        lm.arithmetic(a, weights=[1e39], rank=2)


def test_a_bound_its_dtype_cannot_hold_ends_with_3_and_leaves_nothing(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    a = write_peft(tmp_path / "a", pairs(rng, 4))
    with pytest.raises(GateError, match=r"--max-error 0\.0001 is out of reach") as failure:
        lm.squeeze(a, max_error=1e-4, save_dtype="bfloat16")
    assert failure.value.exit_code == 3
    _, report = lm.squeeze(a, max_error=1e-4)
    assert report.worst.relative_error < 1e-4


def test_a_bound_with_an_allocation_is_one_on_the_whole_adapter(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    factors = pairs(rng, 6)
    for index, (A, _) in enumerate(factors.values()):
        np.multiply(A, 10.0**-index, out=A)
    a = write_peft(tmp_path / "a", factors)
    _, report = lm.squeeze(a, max_error=0.2, allocate="energy")
    assert report.relative_error <= 0.2 < report.worst.relative_error


def test_a_kohya_report_measures_the_file_too(rng: np.random.Generator, tmp_path: Path) -> None:
    A, B = pairs(rng, 5)["layers.0.proj"]
    a = tmp_path / "a.safetensors"
    write_kohya(a, {"lora_unet_m": (A, B, 2.5)})
    result, report = lm.squeeze(a, rank=2)
    tensors = load_file(saved(result, tmp_path))
    down, up = tensors["lora_unet_m.lora_down.weight"], tensors["lora_unet_m.lora_up.weight"]
    found = float(tensors["lora_unet_m.alpha"]) / 2 * up.double().numpy() @ down.double().numpy()
    wanted = 0.5 * B.astype(float) @ A.astype(float)
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert report.relative_error == pytest.approx(error, rel=PLAIN)


def test_fewer_distinct_components_than_clusters_are_counted_and_said(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    pairs = {"lin": (rng.standard_normal((8, 20)), rng.standard_normal((30, 8)))}
    paths = [write_peft(tmp_path / name, pairs, lora_alpha=8) for name in "ab"]
    _, report = lm.cluster(paths, k=12)
    assert report.rank == (8, 8)
    assert any("fewer distinct components" in note for note in report.notes)


def test_a_term_that_begins_with_zeros_is_a_term_and_one_of_zeros_is_none() -> None:
    A, B = np.zeros((3, 40), np.float32), np.zeros((40, 3), np.float32)
    A[0, 39] = B[39, 0] = A[2, 20] = B[20, 2] = 1
    A[1, 0] = 1  # and nothing in B
    assert terms(LowRank(A, B)) == 2
