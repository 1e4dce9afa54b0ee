"""The testbed's tasks, trainer and evaluator, against the files it holds and against PEFT."""

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import loramerge as lm

ROOT = Path(__file__).resolve().parents[1]
TESTBED = ROOT / "fixtures" / "testbed"
ADAPTERS = sorted(TESTBED.glob("*/*/adapter_model.safetensors"))
TINY = [
    *("--base-steps", "2", "--base-batch", "4", "--samples", "12"),
    *("--steps", "2", "--batch", "3", "--device", "cpu"),
]

# PEFT asks transformers under a name that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The scripts of benchmarks/, found as they are when one of them is run."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    names = ("programs", "trainer", "exactmatch", "testbed")
    return {name: importlib.import_module(name) for name in names}


def test_stored_answers_are_what_their_programs_make_of_their_inputs(bench):
    programs = bench["programs"]
    stored = load_file(TESTBED / "eval.safetensors")
    assert len(stored) == 32
    for key, rows in stored.items():
        program = key.partition("/")[2]
        codes = [programs.OPERATION + programs.OPERATIONS.index(p) for p in program.split("_")]
        assert (rows[:, 1:3] == torch.tensor(codes)).all(), key
        letters = rows[:, 3:11].long() - programs.LETTER
        assert torch.equal(programs.solve(program, letters), rows[:, 12:].long()), key


def test_a_program_reads_from_left_to_right(bench):
    solve, letter = bench["programs"].solve, bench["programs"].LETTER
    x = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]])
    assert (solve("sh3_rev", x) - letter).tolist() == [[10, 9, 8, 7, 6, 5, 4, 3]]
    assert (solve("dupl_count", x) - bench["programs"].DIGIT).tolist() == [[2] * 8]
    assert (solve("rotl1_rank", x) - bench["programs"].DIGIT).tolist() == [[1, 2, 3, 4, 5, 6, 7, 0]]


def test_the_base_solves_what_it_was_trained_on_and_no_hard_task(bench):
    programs, exactmatch = bench["programs"], bench["exactmatch"]
    base = exactmatch.load_base(TESTBED)
    draw = torch.Generator().manual_seed(3)
    learned, held = programs.curriculum()
    assert len(learned) == 133
    known = torch.cat([programs.sample(name, 4, draw) for name in learned])
    hard = torch.cat([programs.sample(name, 16, draw) for name in programs.SUITES["hard"]])
    assert not set(programs.SUITES["hard"] + programs.SUITES["easy"]) - set(held)
    assert exactmatch.score(base, known).exact > 0.98
    assert exactmatch.score(base, hard).exact < 0.02


def test_symbols_count_single_right_outputs_and_exact_whole_answers(bench):
    rows = load_file(TESTBED / "eval.safetensors")["test/sh3_rev"][:8].long()
    adapted = bench["exactmatch"].load_adapted(TESTBED, TESTBED / "adapters" / "sh3_rev")
    assert bench["exactmatch"].score(adapted, rows).exact == 1
    spoiled = rows.clone()
    spoiled[0, -1] = 0  # no model says NOP; nothing after the last output depends on it
    found = bench["exactmatch"].score(adapted, spoiled)
    assert (found.exact, found.symbols) == (7 / 8, 63 / 64)


@pytest.mark.parametrize("file", ADAPTERS, ids=lambda file: file.parent.name)
def test_a_bare_copy_of_a_testbed_adapter_knows_its_scale(file):
    adapter = lm.load(str(file))
    assert not adapter.scale_assumed
    assert {module.scaling for module in adapter.modules.values()} == {2.0}


def test_the_testbed_stays_below_20_megabytes():
    assert len(ADAPTERS) == 25
    assert sum(file.stat().st_size for file in TESTBED.rglob("*") if file.is_file()) < 20e6


def test_updates_trained_side_by_side_are_what_peft_makes_of_the_written_adapters(bench, tmp_path):
    trainer, exactmatch = bench["trainer"], bench["exactmatch"]
    jobs = [trainer.Job(("sh3_rev",), 3, "0", "0 a"), trainer.Job(("sort_inter",), 5, "0", "0 b")]
    model = exactmatch.load_base(TESTBED)
    trained, _ = trainer.train_adapters(model, jobs, 2, 4, 20, "cpu", 1e-2)
    draw = torch.Generator().manual_seed(0)
    rows = [bench["programs"].sample(job.programs[0], 6, draw) for job in jobs]
    together = trainer.answers(model, torch.cat(rows)).detach()
    for position, (job, factors) in enumerate(zip(jobs, trained, strict=True)):
        path = tmp_path / f"{position}" / "adapter"
        bench["testbed"].save_adapter(path, factors, job.rank)
        alone = exactmatch.load_adapted(TESTBED, path)
        with torch.no_grad():
            found = trainer.answers(alone, rows[position])
            plain = trainer.answers(exactmatch.load_base(TESTBED), rows[position])
        ours = together[6 * position : 6 * position + 6]
        # Factors are written as float16 (5e-4 relative); two steps at 1e-2 move logits far more.
        assert (found - ours).abs().max() < 0.02 * (ours - plain).abs().max()


def test_an_adapter_comes_out_the_same_whatever_is_trained_beside_it(bench):
    trainer, load_base = bench["trainer"], bench["exactmatch"].load_base
    job = trainer.Job(("sh3_rev",), 2, "0", "0 sh3_rev")
    other = trainer.Job(("sort_inter", "cmax_rank"), 4, "0", "0 other")
    (alone,), _ = trainer.train_adapters(load_base(TESTBED), [job], 2, 3, 12, "cpu")
    (_, beside), _ = trainer.train_adapters(load_base(TESTBED), [other, job], 2, 3, 12, "cpu")
    for module, (A, B) in alone.items():
        assert A.shape[0] == 2
        # Adam divides a step by its own size: rounding shows where a gradient is near zero.
        assert (A - beside[module][0]).abs().max() < 1e-4
        assert (B - beside[module][1]).norm() < 0.01 * B.norm()


def test_training_twice_gives_the_same_testbed(bench, tmp_path):
    for name in ("a", "b"):
        bench["testbed"].main(["train", "--out", str(tmp_path / name), "--tasks", "easy", *TINY])
    files = sorted(path.relative_to(tmp_path / "a") for path in tmp_path.glob("a/**/*.safetensors"))
    assert len(files) == 10
    for file in files:
        first, second = load_file(tmp_path / "a" / file), load_file(tmp_path / "b" / file)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), file


def trained(bench: dict[str, ModuleType], out: Path, *words: str) -> dict[str, dict]:
    """The adapters of one tiny training, base and all, as {name: tensors}."""
    base = ["--base", str(TESTBED / "base")]
    bench["testbed"].main(["train", "--out", str(out), *base, *TINY, *words])
    return {path.parent.name: load_file(path) for path in out.glob("adapters/*/*.safetensors")}


def test_kinds_of_training_differ_as_they_are_asked_to(bench, tmp_path):
    key = "base_model.model.model.layers.2.self_attn.q_proj.lora_{}.weight"
    pair = ("--tasks", "sh3_rev", "sort_inter")
    shared = trained(bench, tmp_path / "shared", *pair, "--init", "shared", "--lr", "1e-9")
    a, b = (shared[name][key.format("A")] for name in ("sh3_rev", "sort_inter"))
    assert torch.equal(a, b)
    separate = trained(bench, tmp_path / "separate", *pair, "--lr", "1e-9")
    a, b = (separate[name][key.format("A")].float() for name in ("sh3_rev", "sort_inter"))
    # Independent rows of 256 entries: a cosine of .3 would be 20 standard deviations.
    assert torch.cosine_similarity(a, b).abs().max() < 0.3
    mixed = trained(bench, tmp_path / "mixed", *pair, "--rank", "2", "4")
    assert [mixed[name][key.format("B")].shape[1] for name in ("sh3_rev", "sort_inter")] == [2, 4]
    joint = trained(bench, tmp_path / "joint", *pair, "--joint")
    assert list(joint) == ["joint2"]


def test_a_checkpoint_is_what_was_learned_so_far(bench, tmp_path):
    words = ("--tasks", "sh3_rev", "--lr", "1e-2")
    trained(bench, tmp_path / "two", *words, "--checkpoint", "1")
    trained(bench, tmp_path / "one", *words, "--steps", "1")  # the first step is the same in both
    early, last, alone = (
        load_file(tmp_path / path / "sh3_rev" / "adapter_model.safetensors")
        for path in ("two/adapters_early", "two/adapters", "one/adapters")
    )
    assert all(torch.equal(early[key], alone[key]) for key in alone)
    assert not any(torch.equal(early[key], last[key]) for key in alone)


def test_fresh_tasks_are_unknown_to_base_and_suites_and_new_with_every_seed(bench):
    programs, fresh = bench["programs"], bench["testbed"].fresh
    base = bench["exactmatch"].load_base(TESTBED)
    first, second = fresh(base, 0), fresh(base, 1)
    assert len(set(first)) == len(set(second)) == 8
    assert first != second
    taken = {*programs.curriculum()[0], *programs.SUITES["hard"], *programs.SUITES["easy"]}
    assert not taken & {*first, *second}
    parts = "_".join(first).split("_")
    assert max(parts.count(part) for part in parts) <= 2


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["sh3_foo"], "sh3_foo: no program"),
        (["mirr_inter", "sh3_rev"], "trained on mirr_inter itself"),
    ],
)
def test_tasks_that_cannot_be_trained_are_named(bench, tmp_path, tasks, message):
    with pytest.raises(SystemExit, match=message):
        trained(bench, tmp_path / "out", "--tasks", *tasks)


def test_evaluate_prints_the_base_and_each_adapter_given(bench, capsys):
    words = ["evaluate", "--n", "4", "--split", "val", str(TESTBED / "compress" / "joint8_r32")]
    bench["testbed"].main(words)
    lines = capsys.readouterr().out.splitlines()
    assert "symbols  relative  cmax_rank" in lines[0]
    exact = {line[:34].strip(): float(line[34:].split()[0]) for line in lines[1:-1]}
    assert np.isclose(exact["own adapters"], 1, atol=0.05)
    assert exact["base"] == 0
    assert exact[next(name for name in exact if name.endswith("joint8_r32"))] > 0.9


def test_fresh_adapters_are_trained_once_and_methods_compared_on_them(
    bench: dict[str, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh = importlib.import_module("fresh")
    few = ["--kinds", "separate", "--methods", "arithmetic", "decorrelate", "--n", "4"]
    words = ["--out", str(tmp_path), *few, "--counts", "8", "--training", *TINY]
    fresh.main(words)
    printed = capsys.readouterr().out
    assert "training 8 adapters" in printed
    assert "decorrelate against arithmetic, adapters merged: 8" in printed
    assert "adapters merged: 4 copies" in printed
    fresh.main(words)
    assert "training" not in capsys.readouterr().out
