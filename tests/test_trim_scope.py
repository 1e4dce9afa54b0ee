"""The largest entries of a whole model: exactly so many, whatever cuts it into pieces."""

import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

import loramerge
from loramerge.errors import UsageError
from loramerge.linalg.kernels import kernels
from loramerge.plan import make_plan
from loramerge.recipe import Named, make_recipe
from tests import entries
from tests.backends import BACKENDS
from tests.build import Pair, write_peft
from tests.conftest import factors
from tests.entries import apart

Model = Mapping[str, np.ndarray]
DENSITY = 0.2


def deltas(pairs: Mapping[str, Pair]) -> Model:
    return {name: B.astype(float) @ A.astype(float) for name, (A, B) in pairs.items()}


def flat(model: Model) -> np.ndarray:
    """All entries in one row, modules by name, as the papers flatten a model."""
    return np.concatenate([model[name].ravel() for name in sorted(model)])


def unflat(row: np.ndarray, model: Model) -> Model:
    found, start = {}, 0
    for name in sorted(model):
        size = model[name].size
        found[name] = row[start : start + size].reshape(model[name].shape)
        start += size
    return found


def trimmed(model: Model, how: str = "magnitude") -> Model:
    row = flat(model)[None]
    thin = (
        entries.trim(row, DENSITY)
        if how == "magnitude"
        else entries.breadcrumbs(row, DENSITY, 0.01)
    )
    return unflat(thin[0], model)


def stored(result: loramerge.Result) -> Model:
    read = {name: result.adapter.read(name) for name in result.adapter.modules}
    return {name: update.B.astype(float) @ update.A.astype(float) for name, update in read.items()}


def run(method: str, adapters: list[Path], **values: object) -> Model:
    exactly = {"rank": "full", "scale": "paper", "save_dtype": "float32", "trim_scope": "model"}
    result, _ = loramerge.run(method, adapters, **{**exactly, **values})
    return stored(result)


@pytest.fixture
def models(tmp_path: Path, rng: np.random.Generator) -> tuple[list[Path], list[Model]]:
    """Three adapters whose modules are of unequal size, the last of which lacks one."""
    paths, found = [], []
    for number, rank in enumerate((4, 4, 6)):
        pairs = {
            name: (A, B * np.float32(size))
            for size, (name, (A, B)) in zip((1, 0.5, 2), factors(rng, rank).items(), strict=True)
        }
        if number == 2:
            del pairs["layers.0.up_proj"]
        paths.append(write_peft(tmp_path / str(number), pairs, lora_alpha=rank))
        found.append(deltas(pairs))
    return paths, found


@pytest.mark.parametrize("space", ["knots", "core", "dense"])
@pytest.mark.parametrize("which", [(0, 1, 2), (0, 0, 2)], ids=["different", "with a copy"])
def test_ties_trims_each_flattened_model(
    models: tuple[list[Path], list[Model]], which: tuple[int, ...], space: str
) -> None:
    paths, found = ([kind[t] for t in which] for kind in models)
    coordinates: list[dict[str, np.ndarray]] = [{} for _ in found]
    back = {}
    for name in found[0]:
        there = [t for t, model in enumerate(found) if name in model]
        xs = [found[t][name] for t in there]
        U = np.eye(len(xs[0])) if space == "dense" else entries.knots_axes(xs)
        V = entries.knots_axes([x.T for x in xs]) if space == "core" else np.eye(xs[0].shape[1])
        back[name] = U, V
        for t, x in zip(there, xs, strict=True):
            coordinates[t][name] = U.T @ x @ V
    thin = [trimmed(model) for model in coordinates]
    merged = run("ties", paths, space=space, compute_dtype="float64")
    for name, (U, V) in back.items():
        wanted = U @ entries.elect_and_mean([model[name] for model in thin if name in model]) @ V.T
        assert apart(merged[name], wanted) < 1e-5  # stored as float32


@pytest.mark.parametrize("how", ["magnitude", "breadcrumbs"])
def test_sparsified_sums_take_their_share_of_each_model(
    models: tuple[list[Path], list[Model]], how: str
) -> None:
    paths, found = models
    merged = run("arithmetic", paths, sparsify=how, density=DENSITY, space="dense")
    thin = [trimmed(model, how) for model in found]
    for name in found[0]:
        wanted = sum(model[name] for model in thin if name in model)
        assert apart(merged[name], wanted) < 1e-5


def whole_numbers(rng: np.random.Generator) -> dict[str, Pair]:
    """An adapter whose delta weights are small whole numbers: nearly all of them are equal."""
    found = {}
    for name, (A, B) in factors(rng, 2).items():
        found[name] = tuple(rng.integers(-1, 2, x.shape).astype(np.float32) for x in (A, B))
    return found


@pytest.mark.parametrize("density", [0.001, 0.05, 0.2, 0.4])
@pytest.mark.parametrize("tile", [2**20, 1])
def test_of_equal_entries_the_first_of_the_first_modules_by_name_are_kept(
    tmp_path: Path,
    rng: np.random.Generator,
    density: float,
    tile: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("loramerge.algorithms._spaces.CPU_TILE", tile)
    monkeypatch.setattr("loramerge.algorithms._spaces.BLOCK", 8)
    pairs = whole_numbers(rng)
    path = write_peft(tmp_path / "a", dict(reversed(pairs.items())), lora_alpha=2)
    merged = run("arithmetic", [path], sparsify="magnitude", density=density, space="dense")
    row = flat(deltas(pairs))
    kept = np.zeros(row.size, bool)
    kept[np.argsort(-np.abs(row), kind="stable")[: math.ceil(density * row.size)]] = True
    np.testing.assert_allclose(flat(merged), row * kept, atol=1e-5)


def test_modules_come_by_name_wherever_they_stand_in_the_files(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    pairs = whole_numbers(rng)
    last = sorted(pairs)[-1]
    A, B = pairs[last]
    first = write_peft(tmp_path / "a", {last: (A, 0 * B)}, lora_alpha=2)
    second = write_peft(tmp_path / "b", pairs, lora_alpha=2)
    merged = run("arithmetic", [first, second], sparsify="magnitude", space="dense")
    np.testing.assert_allclose(flat(merged), flat(trimmed(deltas(pairs))), atol=1e-5)


def test_magnitudes_equal_in_float32_are_equal_in_float64_too(tmp_path: Path) -> None:
    # 1 + (i + j) e + i j e^2, with e a unit in the last place of float32
    near = np.float32(1) + np.float32(2.0**-23) * np.arange(24, dtype=np.float32)
    pair = near[None, :], near[:, None]
    path = write_peft(tmp_path / "a", {"layers.0.q_proj": pair}, lora_alpha=1)
    merged = run("arithmetic", [path], sparsify="magnitude", space="dense", compute_dtype="float64")
    (x,) = deltas({"layers.0.q_proj": pair}).values()
    wanted = entries.trim(x.astype(np.float32), DENSITY) != 0
    np.testing.assert_array_equal(merged["layers.0.q_proj"] > 0.5, wanted)


def test_the_counts_are_the_same_for_any_threads_and_tiles(
    models: tuple[list[Path], list[Model]], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, _ = models
    files = []
    for threads, tile in ((1, 2**20), (8, 2**20), (8, 2**9)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=threads: set(range(n)))
        monkeypatch.setattr("loramerge.algorithms._spaces.CPU_TILE", tile)
        result, _ = loramerge.run("ties", paths, trim_scope="model", space="dense", rank=4)
        files.append(result.adapter.source.path.read_bytes())
    assert files[0] == files[1] == files[2]


def test_a_model_of_one_module_is_that_module(tmp_path: Path, rng: np.random.Generator) -> None:
    paths = []
    for name in "ab":
        pairs = dict([next(iter(factors(rng, 4).items()))])
        paths.append(write_peft(tmp_path / name, pairs, lora_alpha=4))
    files = []
    for scope in ("tensor", "model"):
        result, _ = loramerge.run("ties", paths, trim_scope=scope)
        files.append(result.adapter.source.array(next(iter(result.adapter.source.tensors))))
    np.testing.assert_array_equal(*files)


@pytest.mark.parametrize(
    ("values", "passes"),
    [
        ({}, 2),
        ({"trim_scope": "model"}, 4),
        ({"trim_scope": "model", "scale": "paper"}, 3),
        ({"scale": "paper"}, 1),
    ],
)
def test_the_plan_says_how_many_passes_it_takes(
    three: list[Path], values: dict[str, object], passes: int
) -> None:
    recipe = make_recipe("ties", [Named(str(path)) for path in three], values)
    assert make_plan(recipe, [loramerge.load(path) for path in three]).passes == passes


@pytest.mark.parametrize("sparsify", ["dare", "della", "none"])
def test_only_what_has_a_threshold_has_a_scope(sparsify: str) -> None:
    with pytest.raises(UsageError, match="--trim-scope needs --sparsify magnitude"):
        make_recipe("ties", [Named("a")], {"sparsify": sparsify, "trim_scope": "model"})


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_bits_of_float32_are_in_the_order_of_the_numbers(
    rng: np.random.Generator, name: str
) -> None:
    x = np.abs(rng.standard_normal(1000)).astype(np.float32) * np.float32(10) ** rng.integers(
        -40, 30, 1000
    ).astype(np.float32)
    x[:2] = 0, np.finfo(np.float32).max
    given = BACKENDS[name].put(x)
    bits = BACKENDS[name].take(kernels(given).bits(given))
    assert bits.dtype == np.int32
    np.testing.assert_array_equal(np.argsort(bits, kind="stable"), np.argsort(x, kind="stable"))
    assert bits.tobytes() == x.tobytes()


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_a_tally_counts_every_number_also_those_that_are_not_there(name: str) -> None:
    given = BACKENDS[name].put(np.array([3, 0, 3, 5], np.int32))
    found = BACKENDS[name].take(kernels(given).tally(given, 7))
    assert (found.dtype, found.tolist()) == (np.int64, [1, 0, 0, 2, 0, 1, 0])
    none = given[:0]
    assert BACKENDS[name].take(kernels(none).tally(none, 2)).tolist() == [0, 0]
