"""How much of its tasks a model can do: exact match on the testbed's sequences.

Exact match is the share of sequences whose eight outputs are all right, each predicted from the
right ones before it, which is as often as greedy decoding gives the exact answer.
"""

import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from programs import OUTPUT
from safetensors.torch import load_file
from torch import Tensor
from trainer import answers
from transformers import AutoModelForCausalLM, LlamaForCausalLM

if TYPE_CHECKING:
    from loramerge.adapter import Adapter


@dataclass(frozen=True)
class Score:
    """What a model gets right: the share of whole answers, and of single symbols."""

    exact: float
    symbols: float


def load_base(testbed: Path) -> LlamaForCausalLM:
    """The base of a testbed in float32."""
    model: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(
        testbed / "base", dtype=torch.float32
    )
    return model.eval()


def load_adapted(testbed: Path, adapter: Path) -> torch.nn.Module:
    """The base with an adapter merged into its weights by PEFT."""
    adapted = PeftModel.from_pretrained(load_base(testbed), str(adapter))
    merged: torch.nn.Module = adapted.merge_and_unload()
    return merged.eval()


@contextmanager
def added(base: LlamaForCausalLM, adapter: "Adapter | None") -> Iterator[LlamaForCausalLM]:
    """The base with an adapter's delta weights added; exactly itself again afterwards."""
    kept = {}
    with torch.no_grad():
        for name in adapter.modules if adapter else ():
            update, weight = adapter.read(name), base.get_submodule(name).weight
            kept[weight] = weight.clone()
            weight += torch.from_numpy(update.B @ update.A)
        try:
            yield base
        finally:
            for weight, before in kept.items():
                weight.copy_(before)


def load_data(testbed: Path, split: str, count: int) -> dict[str, Tensor]:
    """The first `count` sequences of every task of a split. {task: [n, 20] int64}"""
    stored = sorted(load_file(testbed / "eval.safetensors").items())
    named = [(*key.split("/"), rows) for key, rows in stored]
    return {task: rows[:count].long() for part, task, rows in named if part == split}


@torch.no_grad()
def score(model: torch.nn.Module, sequences: Tensor) -> Score:
    """How many answers are right. sequences [n, 20]"""
    right = answers(model, sequences).argmax(-1) == sequences[:, OUTPUT:]
    return Score(right.all(1).double().mean().item(), right.double().mean().item())


def scores(
    model: torch.nn.Module, data: Mapping[str, Tensor], tasks: Sequence[str]
) -> dict[str, Score]:
    """The score on each task, a task a thread: teams of threads wait where a core is taken."""
    with ThreadPoolExecutor(
        os.cpu_count(), initializer=torch.set_num_threads, initargs=[1]
    ) as pool:
        found = pool.map(lambda task: score(model, data[task]), tasks)
        return dict(zip(tasks, found, strict=True))


def tasks_of(suite: Path, data: Collection[str]) -> list[str]:
    """The tasks of a suite: its adapters that have data under their name."""
    return [path.name for path in sorted(suite.iterdir()) if path.name in data]


def report(
    testbed: Path,
    suite: str,
    adapters: Sequence[Path],
    split: str = "test",
    count: int = 512,
    crossed: bool = False,
) -> None:
    """Print what adapters do on a suite's tasks; `crossed` prints the suite's own on all tasks."""
    began = time.perf_counter()
    data = load_data(testbed, split, count)
    tasks = tasks_of(testbed / suite, data)
    singles = {
        task: scores(
            load_adapted(testbed, testbed / suite / task), data, tasks if crossed else [task]
        )
        for task in tasks
    }
    own = {task: singles[task][task] for task in tasks}
    print(f"{'':34} exact  symbols  relative  {'  '.join(tasks)}")
    _print("own adapters", own, own)
    for task in tasks if crossed else []:
        _print(f"{suite}/{task}", singles[task], own)
    _print("base", scores(load_base(testbed), data, tasks), own)
    for adapter in adapters:
        _print(str(adapter), scores(load_adapted(testbed, adapter), data, tasks), own)
    print(f"{time.perf_counter() - began:.1f} s")


def _print(name: str, found: Mapping[str, Score], own: Mapping[str, Score]) -> None:
    relative = fmean(s.exact / max(own[task].exact, 1e-9) for task, s in found.items())
    columns = "  ".join(f"{s.exact:{len(task)}.3f}" for task, s in found.items())
    exact = fmean(s.exact for s in found.values())
    symbols = fmean(s.symbols for s in found.values())
    print(f"{name[-34:]:34} {exact:.4f}  {symbols:.4f}    {relative:.4f}  {columns}", flush=True)
