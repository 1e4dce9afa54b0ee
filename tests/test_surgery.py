"""Surgery: scale, pad, select and project, on delta weights and through files."""

from pathlib import Path

import numpy as np
import pytest

import loramerge
from loramerge.adapter import LowRank, Updates
from loramerge.algorithms.project import ProjectOptions, project
from loramerge.algorithms.select import SelectOptions, select
from loramerge.errors import UsageError
from tests.build import write_peft
from tests.conftest import factors
from tests.entries import apart, delta, updates, weighted


def stored(result: loramerge.Result) -> dict[str, np.ndarray]:
    read = {name: result.adapter.read(name) for name in result.adapter.modules}
    return {name: update.B.astype(float) @ update.A.astype(float) for name, update in read.items()}


def adapter(path: Path) -> dict[str, np.ndarray]:
    loaded = loramerge.load(path)
    read = {name: loaded.read(name) for name in loaded.modules}
    return {name: update.B.astype(float) @ update.A.astype(float) for name, update in read.items()}


@pytest.mark.parametrize("factor", [0.5, -2.0, 0.3, 0.0])
def test_scale_multiplies_every_module(three: list[Path], factor: float) -> None:
    result, report = loramerge.run("scale", three[0], factor=factor, save_dtype="float32")
    for name, x in adapter(three[0]).items():
        # float32 in the file
        np.testing.assert_allclose(stored(result)[name], factor * x, atol=2e-6 * np.abs(x).max())
    assert report.rank == ((4, 4) if factor else (0, 0))


@pytest.mark.parametrize("padding", ["zero", "trainable"])
def test_padding_changes_no_update(three: list[Path], padding: str) -> None:
    result, report = loramerge.run("pad", three[0], rank=9, padding=padding, save_dtype="float32")
    for name, x in adapter(three[0]).items():
        found = result.adapter.read(name)
        assert found.rank == 9
        assert apart(stored(result)[name], x) < 1e-6  # float32
        assert found.A[4:].any() == (padding == "trainable")
        assert not found.B[:, 4:].any()
    assert report.relative_error < 1e-6


def test_padding_to_less_than_there_is_is_refused(three: list[Path]) -> None:
    with pytest.raises(UsageError, match="pad --rank 3 is less than the rank 4 there is"):
        loramerge.run("pad", three[0], rank=3)
    with pytest.raises(UsageError, match="padding"):
        loramerge.run("pad", three[0], energy=0.9)


def test_selected_ranks_are_those_of_the_singular_value_decomposition(
    rng: np.random.Generator,
) -> None:
    given = updates(rng, ranks=(6,))
    found = delta(select(given, SelectOptions(ranks="0,2-3,9")))
    for item in range(2):
        U, S, Vh = np.linalg.svd(weighted(given, item)[0])
        kept = [0, 2, 3]
        assert apart(found[item], (U[:, kept] * S[kept]) @ Vh[kept]) < 1e-10


def test_selected_ranks_as_stored_are_a_prefix_of_a_dylora_to_the_bit(three: list[Path]) -> None:
    before = loramerge.load(three[0])
    result, report = loramerge.run("select", three[0], ranks="0-1", stored=True)
    for name, module in before.modules.items():
        whole, part = before.read(name), result.adapter.read(name)
        np.testing.assert_array_equal(part.A, whole.A[:2])
        np.testing.assert_array_equal(part.B, whole.B[:, :2])
        assert module.rank > 2
    assert report.rank == (2, 2)
    with pytest.raises(UsageError, match="--stored says how --ranks counts"):
        loramerge.run("select", three[0], stored=True)


def test_selections_of_all_ranks_add_up_to_the_adapter(three: list[Path]) -> None:
    pieces = [
        loramerge.run("select", three[2], ranks=r, save_dtype="float32") for r in ("0-1", "2-5")
    ]
    assert [report.rank for _, report in pieces] == [(2, 2), (4, 4)]
    first, second = (stored(result) for result, _ in pieces)
    for name, x in adapter(three[2]).items():
        assert apart(first[name] + second[name], x) < 1e-6  # float32


def test_selected_modules_are_as_they_were(three: list[Path]) -> None:
    result, _ = loramerge.run("select", three[0], include=["*.q_proj"], save_dtype="float32")
    assert list(result.adapter.modules) == ["layers.0.q_proj"]
    assert apart(stored(result)["layers.0.q_proj"], adapter(three[0])["layers.0.q_proj"]) < 1e-6


@pytest.mark.parametrize("ranks", ["7-3", "x", "1-", ""])
def test_ranks_that_name_none_are_refused(three: list[Path], ranks: str) -> None:
    with pytest.raises(UsageError, match="--ranks"):
        loramerge.run("select", three[0], ranks=ranks)


@pytest.mark.parametrize("side", ["output", "input", "both"])
def test_what_is_left_of_a_projection_is_at_right_angles_to_the_others(
    rng: np.random.Generator, side: str
) -> None:
    given = updates(rng, weights=(0.5, -3.0, 0.01))
    found = delta(project(given, ProjectOptions(side=side)))
    for item in range(2):
        x, *others = weighted(given, item)
        U, s, _ = np.linalg.svd(np.hstack([o / np.linalg.norm(o) for o in others]))
        V, t, _ = np.linalg.svd(np.vstack([o / np.linalg.norm(o) for o in others]).T)
        U, V = U[:, : (s > 1e-9).sum()], V[:, : (t > 1e-9).sum()]
        wanted = x
        if side != "input":
            wanted = wanted - U @ (U.T @ wanted)
        if side != "output":
            wanted = wanted - (wanted @ V) @ V.T
        assert apart(found[item], wanted) < 1e-10


def test_an_adapter_in_the_span_of_another_is_gone_and_one_outside_stays(
    rng: np.random.Generator,
) -> None:
    x, y = updates(rng, ranks=(3, 5)).factors
    inside = LowRank(rng.standard_normal(x.A.shape), y.B[..., :3])
    gone = delta(project(Updates((inside, y), (1.0, 1.0), (1.0, 1.0)), ProjectOptions()))
    assert np.linalg.norm(gone) < 1e-10 * np.linalg.norm(delta(inside))
    outside = LowRank(x.A, x.B - y.B @ np.linalg.pinv(y.B) @ x.B)
    kept = delta(project(Updates((outside, y), (1.0, 1.0), (1.0, 1.0)), ProjectOptions()))
    assert apart(kept, delta(outside)) < 1e-10
    nothing = Updates((inside, y), (1.0, 0.0), (1.0, 1.0))
    assert apart(delta(project(nothing, ProjectOptions())), delta(inside)) < 1e-10


def test_projection_takes_what_is_missing_for_zero(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    whole, part = factors(rng, 4), factors(rng, 4)
    lone = list(whole)[1]
    del part[lone]
    paths = [write_peft(tmp_path / str(i), p, lora_alpha=4) for i, p in enumerate((whole, part))]
    kept, _ = loramerge.run("project", paths, save_dtype="float32")
    gone, _ = loramerge.run("project", paths[::-1], save_dtype="float32")
    A, B = whole[lone]
    assert apart(stored(kept)[lone], B @ A) < 1e-6  # float32
    assert not stored(gone)[lone].any()


def test_ranks_beyond_all_there_are_are_refused(three: list[Path]) -> None:
    with pytest.raises(UsageError, match="selects nothing: the largest rank there is is 4"):
        loramerge.run("select", three[0], ranks="4-9")
    loramerge.run("select", three[0], ranks="3-9")


def test_a_projection_is_measured_against_the_adapter_it_is_taken_from(
    three: list[Path],
) -> None:
    for settings in ({}, {"scale": "auto"}):  # one pass, and two
        result, report = loramerge.run("project", three, save_dtype="float32", **settings)
        target = sum(np.sum(x**2) for x in adapter(three[0]).values())
        whole = adapter(three[0])
        lost = sum(np.sum((stored(result)[name] - x) ** 2) for name, x in whole.items())
        # float32 in the file
        assert report.relative_error == pytest.approx((lost / target) ** 0.5, rel=1e-5)
        assert report.against == "the first adapter"


def test_a_result_with_nothing_left_says_so(three: list[Path]) -> None:
    for method, adapters, values in (
        ("project", [three[0], three[0]], {}),
        ("scale", three[0], {"factor": 0.0}),
    ):
        _, report = loramerge.run(method, adapters, **values)
        assert "nothing is left in any module" in report.notes
    _, report = loramerge.run("project", three)
    assert not any("nothing is left" in note for note in report.notes)
