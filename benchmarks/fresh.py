"""Merge methods on adapters and tasks that no constant was chosen on: trained here, then compared.

python benchmarks/fresh.py --out DIR [--seeds 1 2] [--kinds shared gentle] [--methods tsv ties]

Each seed stands for eight tasks the base has no idea of, each kind for a way to train them. What
DIR holds already is not trained again. Eight adapters take a GPU half a minute, a CPU ten.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import testbed
from exactmatch import added, load_base, load_data, scores, tasks_of
from testbed import FIXTURE
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.utils import logging

import loramerge as lm

KINDS = {
    "separate": (),
    "shared": ("--init", "shared"),
    "gentle": ("--lr", "3e-4"),
    "hot": ("--lr", "2e-3"),
    "mixed": ("--rank", "4", "8", "16", "32"),
    # What separate adapters were like on the way: the same initial values and data.
    "earlier": ("--steps", "600"),
}
COPIES = 4


@dataclass(frozen=True)
class Set:
    """Adapters that become one, and the tasks the result is judged on."""

    name: str
    adapters: tuple[str, ...]
    tasks: tuple[str, ...]


def sets(directory: Path, kind: str, tasks: Sequence[str], counts: Sequence[int]) -> Iterator[Set]:
    """So many at once, as often as there are; copies and two checkpoints of one adapter."""
    paths = {task: str(directory / kind / task) for task in tasks}
    for count in counts:
        for start in range(0, len(tasks) - count + 1, count):
            some = tuple(tasks[start : start + count])
            yield Set(f"{kind} {count}.{start}", tuple(paths[task] for task in some), some)
    if kind == "separate":
        first = tasks[0]
        yield Set(f"{COPIES} copies", (paths[first],) * COPIES, (first,))
        if (earlier := directory / "earlier" / first).exists():
            yield Set("2 checkpoints", (str(earlier), paths[first]), (first,))


class Bench:
    """One seed's testbed, and what methods make of it."""

    def __init__(self, arguments: argparse.Namespace, seed: int) -> None:
        self.directory: Path = arguments.out / f"seed{seed}"
        self.rank: str = arguments.rank
        for kind in arguments.kinds:
            if not (self.directory / kind).exists():
                self._train(arguments, kind, seed)
        self.base: LlamaForCausalLM = load_base(self.directory)
        self.data: dict[str, Tensor] = load_data(self.directory, "test", arguments.n)

    def _train(self, arguments: argparse.Namespace, kind: str, seed: int) -> None:
        words = ["train", "--out", str(self.directory), "--suite", kind, "--tasks", "fresh"]
        words += ["--base", str(FIXTURE / "base"), "--seed", str(seed), *arguments.training]
        testbed.main([*words, *KINDS[kind]])

    def exact(self, method: str, chosen: Set) -> list[float]:
        """The exact match on each of the tasks of a set after its adapters are merged."""
        rank = int(self.rank) if self.rank.isdigit() else self.rank
        result, _ = lm.run(method, list(chosen.adapters), rank=rank)
        with added(self.base, result.adapter) as model:
            return [found.exact for found in scores(model, self.data, chosen.tasks).values()]


def main(words: Sequence[str] | None = None) -> None:
    """Train what is missing, and print how far each method is ahead of the first."""
    arguments = _parser().parse_args(words)
    logging.disable_progress_bar()
    first, *others = arguments.methods
    gains: dict[tuple[str, str], list[float]] = {}
    for seed in arguments.seeds:
        bench = Bench(arguments, seed)
        for kind in arguments.kinds:
            tasks = tasks_of(bench.directory / kind, bench.data)
            for chosen in sets(bench.directory, kind, tasks, arguments.counts):
                found = {method: bench.exact(method, chosen) for method in arguments.methods}
                _print(seed, chosen, found)
                for method in others:
                    gain = fmean(found[method]) - fmean(found[first])
                    count = str(len(chosen.adapters)) if chosen.name[0].isalpha() else chosen.name
                    gains.setdefault((method, count), []).append(gain)
    for (method, count), some in gains.items():
        spread = f"{fmean(some):+.4f}, from {min(some):+.3f} to {max(some):+.3f}"
        print(f"{method} against {first}, adapters merged: {count}: {spread}, sets: {len(some)}")


def _print(seed: int, chosen: Set, found: dict[str, list[float]]) -> None:
    print(f"seed {seed} {chosen.name}: {' '.join(chosen.tasks)}")
    for method, exact in found.items():
        each = " ".join(f"{one:.2f}" for one in exact)
        print(f"  {method:14} {fmean(exact):.4f}   {each}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="where testbeds are trained and kept")
    add("--seeds", type=int, nargs="+", default=[1], help="eight tasks each")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="how they are trained")
    add("--methods", nargs="+", default=["tsv", "arithmetic", "decorrelate"], help="at defaults")
    add("--counts", type=int, nargs="+", default=[8, 4, 2], help="how many are merged at once")
    add("--rank", default="16", help="of the result")
    add("--n", type=int, default=512, help="sequences a task")
    add("--training", nargs=argparse.REMAINDER, default=[], help="last: words for testbed.py train")
    return parser


if __name__ == "__main__":
    main()
