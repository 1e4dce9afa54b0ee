"""Tables over one option: every row is what a run with that value reports, nothing is written."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import loramerge as lm
from loramerge.adapter import Updates
from loramerge.algorithms.cluster import ClusterOptions, cluster, each_k
from loramerge.algorithms.prune import PruneOptions, each_threshold, prune
from loramerge.errors import UsageError
from loramerge.io._source import Source
from loramerge.registry import methods
from tests.test_prune import ALPHA, GATES, checkpoint
from tests.typed import tree, typed
from tests.updates import gaussian

TRIED: dict[str, list[float]] = {"cluster": [1, 3, 9, 14], "prune": [0, 0.1, 0.5, 0.9]}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, three: list[Path]) -> Path:
    """A current directory with the adapters a, b (rank 4) and c (rank 6)."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_can_be_swept_is_tested_here() -> None:
    assert {name for name, method in methods().items() if method.sweep} == set(TRIED)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("cluster", {}),
        ("cluster", {"gauge": "raw", "reweight": "none", "scale": "paper"}),
        ("cluster", {"weights": [1, -0.5, 2], "scale": 0.3, "lambda_": -2.0}),
        ("cluster", {"scale": "ls", "lambda_": 0.5, "layout": "pattern"}),
        ("prune", {}),
        ("prune", {"shrink": "soft", "keep": 3}),
        ("prune", {"gauge": "raw", "layout": "uniform"}),
    ],
)
def test_every_row_is_what_a_run_with_that_value_reports(
    three: list[Path], name: str, values: dict[str, object]
) -> None:
    inputs = three if name == "cluster" else three[2:]
    sweep = methods()[name].sweep
    assert sweep
    rows = lm.sweep(name, inputs, TRIED[name], **values)
    assert [row.value for row in rows] == TRIED[name]
    for row in rows:
        _, report = lm.run(name, inputs, **{sweep.option: row.value}, **values)
        assert row.ranks == {module.name: module.rank for module in report.modules}
        assert row.energy == pytest.approx(report.energy, rel=1e-5)
        assert row.scale == pytest.approx(report.scale, rel=1e-9)
        assert row.file_bytes == report.file_bytes
        # An exact result differs from the sum by the rounding of float32 alone.
        assert row.relative_error == pytest.approx(report.relative_error, rel=1e-5, abs=1e-6)


def test_parameters_are_the_numbers_the_kept_ranks_take(three: list[Path]) -> None:
    for row in lm.sweep("prune", three[2], TRIED["prune"]):
        result, _ = lm.prune(three[2], threshold=row.value, layout="pattern")
        modules = result.adapter.modules.values()
        assert row.parameters == sum(m.rank * (m.in_features + m.out_features) for m in modules)


def test_the_gates_of_a_sora_checkpoint_are_swept(tmp_path: Path) -> None:
    checkpoint(tmp_path / "sora.safetensors", GATES)
    adapter = lm.load(tmp_path / "sora.safetensors", alpha=ALPHA)
    rows = lm.sweep("prune", adapter, [0, 0.1, 1.0], absolute=True)
    assert [list(row.ranks.values()) for row in rows] == [[3, 1], [2, 1], [1, 0]]
    for row in rows:
        _, report = lm.prune(adapter, threshold=row.value, absolute=True)
        assert row.file_bytes == report.file_bytes


def test_a_value_that_leaves_nothing_is_a_row_of_zeros(three: list[Path]) -> None:
    [row] = lm.sweep("prune", three[2], [1])
    assert (row.rank, row.parameters, row.file_bytes, row.energy) == ((0, 0, 0), 0, 0, 0)
    assert row.relative_error == 1


def test_inertia_falls_with_k_to_zero(three: list[Path]) -> None:
    found = [row.figures["inertia"] for row in lm.sweep("cluster", three, [1, 2, 4, 8, 13, 14])]
    assert found == sorted(found, reverse=True)
    assert found[-1] == 0
    assert found[-2] > 0


@pytest.mark.parametrize("gauge", ["svd", "balanced", "raw"])
def test_trying_a_value_is_the_method_with_that_value(rng: np.random.Generator, gauge: str) -> None:
    factors = tuple(gaussian(rng, 30, 20, rank) for rank in (3, 5))
    many = Updates(factors, (1.0, -0.5), (1.0, 2.0), seed=3)
    ks = [1, 4, 8, 20]
    for k, (found, _) in zip(ks, each_k(many, ClusterOptions(gauge=gauge), ks), strict=True):
        assert np.array_equal(found.B, cluster(many, ClusterOptions(k=k, gauge=gauge)).B)
    if gauge == "balanced":
        return
    one = Updates(factors[1:], (1.0,), (2.0,))
    limits = [0.0, 0.5, 0.9]
    trials = each_threshold(one, PruneOptions(gauge=gauge), limits)
    for limit, (found, _) in zip(limits, trials, strict=True):
        assert np.array_equal(found.B, prune(one, PruneOptions(threshold=limit, gauge=gauge)).B)


def test_every_tensor_is_read_once(three: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    array: Callable[[Source, str], object] = Source.array

    def spy(self: Source, key: str) -> object:
        read.append(f"{self.path}:{key}")
        return array(self, key)

    monkeypatch.setattr(Source, "array", spy)
    lm.sweep("cluster", three, TRIED["cluster"])
    assert len(read) == len(set(read)) == 3 * 2 * 3


def test_the_command_prints_a_table_and_writes_nothing() -> None:
    before = tree(Path())
    done = typed("cluster", "a", "b", "--sweep-k", "2,8", "--scale", "paper")
    assert done.code == 0
    head, *rows = (line.split() for line in done.out.splitlines())
    assert " ".join(head) == "k rank mean energy error inertia parameters size"
    assert [row[0] for row in rows] == ["2", "8"]
    assert rows[1][1:3] == ["8", "8"]
    assert (rows[1][-4:-2], rows[1][-1]) == (["0", "1,408"], "kB")
    assert done.err == "sweep  nothing was written\n"
    assert tree(Path()) == before


def test_columns_stand_under_their_names() -> None:
    lines = typed("prune", "c", "--sweep", "0,0.25,0.5").out.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert " ".join(lines[0].split()) == "threshold rank mean energy error parameters size"
    assert [line.split()[0] for line in lines[1:]] == ["0", "0.25", "0.5"]


def test_json_holds_every_column_with_its_digits(three: list[Path]) -> None:
    done = typed("cluster", "a", "b", "--sweep-k", "2,8", "--json")
    facts = json.loads(done.out)
    assert (facts["method"], facts["option"], facts["scale"]) == ("cluster", "k", "auto")
    for found, row in zip(facts["trials"], lm.sweep("cluster", three[:2], [2, 8]), strict=True):
        assert found == {
            "k": row.value,
            "rank": list(row.rank[:2]),
            "mean_rank": row.rank[2],
            "retained_energy": row.energy,
            "relative_error": row.relative_error,
            "inertia": row.figures["inertia"],
            "factor": row.scale,
            "parameters": row.parameters,
            "bytes": row.file_bytes,
        }


def test_quiet_leaves_the_table_alone() -> None:
    done = typed("cluster", "a", "b", "--sweep-k", "2", "-q")
    assert (done.err, done.out.splitlines()[0].split()[0]) == ("", "k")


def test_what_must_be_known_stands_under_the_table() -> None:
    (Path("a") / "adapter_config.json").unlink()
    done = typed("prune", "a", "--sweep", "0,0.1")
    assert done.lines[-1].startswith("assumed  scale 1: a does not say its alpha")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("cluster a b --sweep-k 2,0", "-k is 0; it must be a whole number >= 1"),
        ("cluster a b --sweep-k 2,few", "-k is 'few'; it must be a whole number >= 1"),
        ("cluster a b --sweep-k 2.5", "-k is '2.5'; it must be a whole number"),
        ("prune a --sweep 0,-1", "--threshold is -1.0; it must be a number >= 0"),
        ("prune a --sweep nan", "--threshold is nan"),
        ("cluster a b --sweep-k 2,4 -k 3", "a sweep is over -k alone; it takes no -k"),
        ("cluster a b --sweep-k 2,4 -r 3", "a sweep is over -k alone; it takes no --rank"),
        ("prune a --sweep 0,1 --energy 0.9", "over --threshold alone; it takes no --energy"),
        ("prune a --sweep 0,1 --size 1MB", "over --threshold alone; it takes no --size"),
        ("prune a b --sweep 0,1", "prune takes one adapter, not 2"),
        ("cluster a b --sweep-k 2 -o out", "a sweep writes nothing; it takes no --out"),
        ("prune a b --sweep 0 --out-dir out", "a sweep writes nothing; it takes no --out-dir"),
        ("cluster a b --sweep-k 2 --dry-run --force", "it takes no --force and --dry-run"),
    ],
)
def test_what_a_sweep_cannot_do_is_refused_by_name(words: str, said: str) -> None:
    before = tree(Path())
    done = typed(*words.split())
    assert (done.code, done.out) == (2, "")
    assert said in done.lines[0]
    assert tree(Path()) == before


def test_python_refuses_what_cannot_be_swept(three: list[Path]) -> None:
    with pytest.raises(UsageError, match="arithmetic cannot be swept") as caught:
        lm.sweep("arithmetic", three, [1])
    assert caught.value.hint == "cluster, prune can"
    with pytest.raises(UsageError, match="cluster: there is no -k to try"):
        lm.sweep("cluster", three, [])
