"""--module-weight: a factor on the weight of an adapter where a glob matches, in every method."""

from pathlib import Path

import numpy as np
import pytest

import loramerge as lm
from loramerge.batches import batches
from loramerge.compute import Compute
from loramerge.errors import UsageError
from loramerge.linalg.scales import Totals, factor
from loramerge.plan import Plan, make_plan
from loramerge.recipe import Named, make_recipe
from loramerge.registry import methods
from loramerge.weights import Weights, module_weight
from tests.build import read_deltas, write_peft
from tests.conftest import SHAPES, factors
from tests.typed import typed

Q, UP, DOWN = SHAPES
# Bits do not depend on what else is computed, where every module's length is its own.
OWN_LENGTH = {"rank": 4, "scale": "paper"}
each_merge = pytest.mark.parametrize(
    "method", [name for name, found in methods().items() if found.takes == "many"]
)


def taken(method: str, paths: list[Path]) -> list[Path]:
    """As many adapters as a method takes."""
    return paths[: methods()[method].inputs]


def merged(
    method: str, paths: list[Path], out: Path, weights: list[float] | None = None, **values: object
) -> dict[str, np.ndarray]:
    """The delta weights of a merge as written."""
    return read_deltas(lm.run(method, paths, weights=weights, **values)[0].save(out))


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    """Whether two results have the same modules and not a bit of them differs."""
    return found.keys() == expected.keys() and all(
        np.array_equal(found[name], expected[name]) for name in found
    )


def planned(method: str, paths: list[Path], weights: list[float], **values: object) -> Plan:
    named = [Named(str(path), weight) for path, weight in zip(paths, weights, strict=True)]
    return make_plan(make_recipe(method, named, values), [lm.load(path) for path in paths])


@each_merge
@pytest.mark.parametrize("number", [0.5, -2.0, 0.0])
def test_on_every_module_it_is_the_weight_itself(
    method: str, number: float, three: list[Path], tmp_path: Path
) -> None:
    paths = taken(method, three)
    weight = merged(method, paths, tmp_path / "weight", [1.0, number, 1.0][: len(paths)])
    module = merged(method, paths, tmp_path / "module", module_weight=[f"2:*={number}"])
    assert same(module, weight)


@each_merge
@pytest.mark.parametrize("number", [0.5, -2.0])
def test_on_one_module_it_is_that_module_merged_alone_with_that_weight(
    method: str, number: float, three: list[Path], tmp_path: Path
) -> None:
    paths = taken(method, three)
    weights = [0.8, -0.6, 1.0][: len(paths)]
    changed = [0.8, -0.6 * number, 1.0][: len(paths)]
    text = f"2:{UP}={number}"
    found = merged(method, paths, tmp_path / "all", weights, module_weight=[text], **OWN_LENGTH)
    alone = merged(method, paths, tmp_path / "one", changed, include=[UP], **OWN_LENGTH)
    others = merged(method, paths, tmp_path / "rest", weights, exclude=[UP], **OWN_LENGTH)
    assert same(found, alone | others)


@each_merge
def test_zero_is_the_adapter_without_the_module(
    method: str, three: list[Path], tmp_path: Path, rng: np.random.Generator
) -> None:
    whole = factors(rng, 4)
    part = {name: pair for name, pair in whole.items() if name != UP}
    full, less = (write_peft(tmp_path / name, x) for name, x in (("full", whole), ("less", part)))
    rest = taken(method, three)[2:]
    zero = merged(method, [three[0], full, *rest], tmp_path / "zero", module_weight=[f"2:{UP}=0"])
    assert same(zero, merged(method, [three[0], less, *rest], tmp_path / "lacking"))


def test_without_a_number_it_is_for_all_adapters(three: list[Path], tmp_path: Path) -> None:
    all_, each = [f"{UP}=0.5"], [f"{n}:{UP}=0.5" for n in (1, 2, 3)]
    found = merged("cat", three, tmp_path / "all", module_weight=all_)
    assert same(found, merged("cat", three, tmp_path / "each", module_weight=each))


def test_factors_that_meet_multiply_in_any_order(three: list[Path], tmp_path: Path) -> None:
    texts = ["layers.0-0.*=0.5", "*.q_proj=-3", "1:*=2"]
    original = [read_deltas(path) for path in three]
    for order in (texts, texts[::-1]):
        found = merged("cat", three, tmp_path / order[0], [1, 1, 4], module_weight=order)
        factor = {Q: -1.5, UP: 0.5, DOWN: 1.0}
        for name in SHAPES:
            parts = [original[t][name] * w for t, w in enumerate((2, 1, 4))]
            expected = factor[name] * sum(parts)
            # float32 factors
            np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", ["auto", "norm", "ls"])
def test_the_length_of_a_merge_is_taken_from_the_weighted_modules(
    scale: str, three: list[Path]
) -> None:
    _, report = lm.arithmetic(
        three, scale=scale, rank="full", module_weight=["2:layers.0-0.*=-3", "*.q_proj=0.5"]
    )
    weights = {Q: (0.5, -1.5, 0.5), UP: (1, -3, 1), DOWN: (1, 1, 1)}
    deltas = [read_deltas(path) for path in three]
    parts = [
        np.concatenate([weights[n][t] * deltas[t][n].ravel() for n in SHAPES]) for t in range(3)
    ]
    total = sum(parts)
    square = float(total @ total)
    totals = Totals(tuple(float(part @ part) for part in parts), square, square, square)
    # Gram matrices of float32 factors
    assert report.scale == pytest.approx(factor(scale, totals), rel=1e-5)


@each_merge
@pytest.mark.parametrize("rank", [2, "full"])
def test_errors_are_measured_against_the_weighted_sum(
    method: str, rank: int | str, three: list[Path], tmp_path: Path
) -> None:
    paths = taken(method, three)
    result, report = lm.run(method, paths, rank=rank, module_weight=["2:layers.0-0.*=-3"])
    found = read_deltas(result.save(tmp_path / "out"))
    deltas = [read_deltas(path) for path in paths]
    for module in report.modules:
        weight = -3 if module.name.startswith("layers.0") else 1
        counted = (1, 0, 0) if methods()[method].removes else (1, weight, 1)
        wanted = sum(w * x[module.name] for w, x in zip(counted, deltas, strict=False))
        assert module.target == pytest.approx(np.sum(wanted**2), rel=1e-5)
        gap = np.linalg.norm(found[module.name] - wanted) / np.linalg.norm(wanted)
        # A sum with every rank is exact but for the rounding of float32.
        assert module.relative_error == pytest.approx(gap, rel=1e-4, abs=1e-6)


def test_modules_of_different_weights_share_no_batch(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    pairs = {
        f"layers.{i}.proj": (rng.standard_normal((2, 6)), rng.standard_normal((8, 2)))
        for i in range(6)
    }
    paths = [write_peft(tmp_path / name, pairs) for name in "ab"]
    plan = planned("cat", paths, [1, 1], module_weight=["layers.0-2.*=0.5", "2:layers.5.*=0"])
    found = {tuple(m.name for m in batch) for batch in batches([plan], Compute())}
    names = [*pairs]
    assert found == {tuple(names[:3]), tuple(names[3:5]), tuple(names[5:])}


def test_a_module_without_any_weight_is_left_out_and_named(
    three: list[Path], tmp_path: Path
) -> None:
    result, report = lm.cat(three, module_weight=["*.up_proj=0"])
    assert read_deltas(result.save(tmp_path / "out")).keys() == {Q, DOWN}
    assert f"left out, every weight is 0: {UP}" in report.notes
    assert (report.total, report.merged) == (3, 2)


def test_the_rank_of_an_adapter_left_out_counts_no_more(three: list[Path]) -> None:
    # a and b have rank 4, c has rank 6.
    assert planned("arithmetic", three, [1, 1, 0]).ranks == dict.fromkeys(SHAPES, 4)
    plan = planned("cat", three, [1, 1, 1], module_weight=["3:*.up_proj=0"])
    assert plan.ranks == {Q: 14, UP: 8, DOWN: 14}


def test_the_report_says_how_far_each_reaches_and_every_weight(three: list[Path]) -> None:
    texts = ["layers.0-0.*=0.5", "2:*.q_proj=0"]
    _, report = lm.cat(three, weights=[1, 2, 3], module_weight=texts)
    facts = report.as_json()
    for text, count in zip(texts, (2, 1), strict=True):
        assert f"--module-weight '{text}' weighs {count} of 3 modules" in facts["notes"]
    assert facts["recipe"]["settings"]["module_weight"] == tuple(texts)
    assert {m["name"]: m["weights"] for m in facts["modules"]} == {
        Q: [0.5, 0, 1.5],
        UP: [0.5, 1, 1.5],
        DOWN: [1, 2, 3],
    }


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("*.q_proj", "is '*.q_proj'; it must be [N:]GLOB=X", "'layers.0-7.*=0.5'"),
        ("=1", "is '=1'; it must be", "'layers.0-7.*=0.5'"),
        ("2:=1", "is '2:=1'; it must be", "'layers.0-7.*=0.5'"),
        ("*=", "is '*='; it must be", "'layers.0-7.*=0.5'"),
        ("*=half", "must be [N:]GLOB=X with a finite number X.", "'layers.0-7.*=0.5'"),
        ("*=nan", "is '*=nan'; it must be", "'layers.0-7.*=0.5'"),
        ("*=1e999", "is '*=1e999'; it must be", "'layers.0-7.*=0.5'"),
        ("0:*=1", "'0:*=1' is for adapter 0 of 3", "--module-weight '3:*=1'"),
        ("4:*.q_proj=-0.5", "is for adapter 4 of 3", "--module-weight '3:*.q_proj=-0.5'"),
        ("q_proj=1", "'q_proj=1' matches no merged module.", "did you mean '*.q_proj=1'?"),
        ("layers.1-0.*=1", "matches no merged module.", "did you mean 'layers.0-1.*=1'?"),
        ("2:q_proj=0.5", "matches no merged module of b.", "did you mean '2:*.q_proj=0.5'?"),
        ("2:*.nope=1", "'2:*.nope=1' matches no merged module of b.", "a module is called"),
        ("*=0", "Every weight is 0", "-w 1"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_a_tensor_is_read(
    text: str, said: str, hint: str, three: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(three[0].parent)
    done = typed("arithmetic", "a", "b", "c", "--module-weight", text, "--dry-run")
    assert (done.code, done.out) == (2, "")
    assert len(done.lines) == 2
    assert said in done.lines[0]
    assert hint in done.lines[1]


def test_without_adapters_it_is_the_adapters_that_are_missed() -> None:
    assert "cat needs adapters" in typed("cat", "--module-weight", "1:*=2").err


def test_a_bad_form_is_found_before_a_missing_file() -> None:
    assert "--module-weight is 'x'" in typed("cat", "nope", "--module-weight", "x").err


def test_a_glob_must_match_what_the_adapter_has_and_what_is_merged(
    three: list[Path], tmp_path: Path, rng: np.random.Generator
) -> None:
    part = write_peft(tmp_path / "part", {Q: factors(rng, 4)[Q]})
    with pytest.raises(UsageError, match=r"matches no merged module of .*part\."):
        planned("cat", [three[0], part], [1, 1], module_weight=["2:*.up_proj=2"])
    with pytest.raises(UsageError, match="matches no merged module"):
        planned("cat", three, [1, 1, 1], module_weight=["*.up_proj=2"], exclude=["*.up_proj"])


def test_a_number_a_glob_and_a_factor_are_told_apart() -> None:
    one = module_weight("2:a=b:*=-1e-3")
    assert (one.adapter, one.glob, one.factor) == (1, "a=b:*", -1e-3)
    assert (one.frame, module_weight("2:2=2").frame) == ("2:{}=-1e-3", "2:{}=2")
    assert Weights((2.0, 3.0), (one,)).at("a=b:c") == (2.0, -0.003)
    assert Weights((2.0, 3.0), (one,)).at("a") == (2.0, 3.0)


def test_a_compressor_takes_none(three: list[Path]) -> None:
    with pytest.raises(UsageError, match="squeeze has no option 'module_weight'"):
        lm.squeeze(three[0], rank=2, module_weight=["*=2"])
