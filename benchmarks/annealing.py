"""Rank annealing with PEFT: train, squeeze, train on, and what that is worth (LoRA-Squeeze).

python benchmarks/annealing.py [--quick] [--task sort_inter] [--write FILE]

Four ways to an adapter of a small rank, each with the same number of training steps: trained at
that rank; trained at rank 32 and squeezed (Post-Squeeze); squeezed after three quarters of the
steps and trained on (Cont-Squeeze); and through all ranks between, the steps shared out evenly and
`squeeze --step` in between (In-Squeeze). Then the same question at convergence, from the adapters
of the testbed, which were trained for 800 steps of 64 sequences instead of 32, and are trained on
for 60 after squeezing. Exact match of a task that the base cannot do at all.
"""

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from exactmatch import load_base, load_data, score
from peft import LoraConfig, PeftModel, get_peft_model
from programs import sample
from testbed import FIXTURE, PROJECTIONS
from torch.nn import functional
from trainer import OUTPUT, SCALING, answers, generator
from transformers import LlamaForCausalLM
from transformers.utils import logging

import loramerge as lm

SCHEDULE = "32,16,8,4,2,1"
MORE = 60  # steps that an adapter squeezed at convergence is trained on
WARMUP = 20  # steps after which Adam has its bearings, anew in every stage
CAPTION = """\
The paper's claim where it holds and where it does not: exact match of a task of the testbed, its
adapters trained with PEFT for so many steps of 32 sequences, or for 800 of 64, which is to
convergence (`python benchmarks/annealing.py`). After 60 steps squeezing a large rank beats training
the small one by far, and annealing has too few steps for each of its stages; after 120 annealing is
the best way to every rank. At convergence training the small rank is as good at rank 4 and better
at 2 and 1, where only training on after squeezing comes near."""
WAYS = {
    "direct": "trained at that rank",
    "post": "trained at rank 32, squeezed (Post-Squeeze)",
    "cont": "squeezed and trained on (Cont-Squeeze)",
    "anneal": "through 32, 16, 8 and so on (In-Squeeze)",
}


@dataclass(frozen=True)
class Course:
    """A training whose learning rate falls to zero over all its steps, in one or more stages."""

    base: LlamaForCausalLM
    data: torch.Tensor
    steps: int
    room: Path
    batch: int = 32
    peak: float = 1e-3

    def stage(self, adapter: Path | int, first: int, last: int, name: str) -> Path:
        """Train a new adapter of a rank, or train one on, from step `first` to `last`."""
        if isinstance(adapter, int):
            torch.manual_seed(adapter)
            alpha = int(SCALING * adapter)
            config = LoraConfig(r=adapter, lora_alpha=alpha, target_modules=PROJECTIONS)
            model = get_peft_model(self.base, config)
        else:
            model = PeftModel.from_pretrained(self.base, str(adapter), is_trainable=True)
        self._descend(model, first, last)
        out = self.room / name
        model.save_pretrained(str(out), save_embedding_layers=False)
        model.unload()
        return out

    def _descend(self, model: PeftModel, first: int, last: int) -> None:
        """Adam from a fresh state: its moments belong to factors that squeezing has replaced."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.98))
        draw = generator("cpu", "order", first)
        for step in range(first, last):
            warm = min(1.0, (step - first + 1) / WARMUP)
            optimizer.param_groups[0]["lr"] = self.peak * warm * (1 - step / self.steps)
            chosen = torch.randint(0, len(self.data), (self.batch,), generator=draw)
            logits = answers(model, self.data[chosen])
            loss = functional.cross_entropy(logits.mT, self.data[chosen][:, OUTPUT:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def ways(self, ranks: Sequence[int]) -> dict[str, list[Path]]:
        """An adapter of each rank by each way."""
        steps, highest = self.steps, int(SCHEDULE.split(",", maxsplit=1)[0])
        whole = self.stage(highest, 0, steps, "whole")
        part = self.stage(highest, 0, steps * 3 // 4, "part")
        squeezed = {rank: self.squeezed(part, rank, f"part-{rank}") for rank in ranks}
        return {
            "direct": [self.stage(rank, 0, steps, f"direct-{rank}") for rank in ranks],
            "post": [self.squeezed(whole, rank, f"post-{rank}") for rank in ranks],
            "cont": [
                self.stage(squeezed[rank], steps * 3 // 4, steps, f"cont-{rank}") for rank in ranks
            ],
            "anneal": [self.annealed(rank) for rank in ranks],
        }

    def squeezed(self, adapter: Path, rank: int, name: str) -> Path:
        """`loramerge squeeze adapter --rank N`."""
        return lm.squeeze(adapter, rank=rank)[0].save(self.room / name)

    def annealed(self, rank: int) -> Path:
        """Down the schedule to a rank, one stage of training at each."""
        ranks = [r for r in map(int, SCHEDULE.split(",")) if r >= rank]
        ends = [self.steps * (place + 1) // len(ranks) for place in range(len(ranks))]
        found = self.stage(ranks[0], 0, ends[0], f"anneal-{rank}-{ranks[0]}")
        for place, lower in enumerate(ranks[1:]):
            name = f"anneal-{rank}-{lower}"
            # The same line after every stage: loramerge squeeze adapter --step 32,16,8,4,2,1
            stepped = lm.squeeze(found, step=SCHEDULE)[0].save(self.room / f"{name}-start")
            found = self.stage(stepped, ends[place], ends[place + 1], name)
        return found


def converged(course: Course, task: str, ranks: Sequence[int]) -> dict[str, list[Path]]:
    """The same from the testbed's adapters, with the course for what is trained on."""
    compress = FIXTURE / "compress"
    squeezed = [course.squeezed(compress / f"{task}_r32", rank, f"long-{rank}") for rank in ranks]
    return {
        "direct": [compress / f"{task}_r{rank}_direct" for rank in ranks],
        "post": squeezed,
        "cont": [
            course.stage(start, 0, course.steps, f"long-{rank}-on")
            for rank, start in zip(ranks, squeezed, strict=True)
        ],
    }


def rows(
    course: Course, label: str, ways: Mapping[str, Sequence[Path]], judged: torch.Tensor
) -> Iterator[str]:
    """Exact match of every adapter, a row of Markdown for each way."""
    for way, adapters in ways.items():
        found = []
        for adapter in adapters:
            model = PeftModel.from_pretrained(course.base, str(adapter)).eval()
            found.append(f"{score(model, judged).exact:.3f}")
            model.unload()
        yield f"| {label} | {WAYS[way]} | {' | '.join(found)} |"


def table(
    task: str, lengths: Sequence[int], more: int, ranks: Sequence[int], batch: int
) -> Iterator[str]:
    """The whole table, row by row."""
    base, judged = load_base(FIXTURE), load_data(FIXTURE, "test", 16 * batch)[task]
    data = sample(task, 40_000, generator("cpu", "pool", 0, task))
    yield f"| steps | {task} | {' | '.join(f'rank {rank}' for rank in ranks)} |"
    yield "|---" * (2 + len(ranks)) + "|"
    for steps in lengths:
        with tempfile.TemporaryDirectory() as room:
            course = Course(base, data, steps, Path(room), batch)
            yield from rows(course, str(steps), course.ways(ranks), judged)
    with tempfile.TemporaryDirectory() as room:
        course = Course(base, data, more, Path(room), batch)
        ways = converged(course, task, ranks)
        yield from rows(course, "800, of 64", ways, judged)


def numbers(text: str) -> list[int]:
    """The whole numbers between commas."""
    return [int(word) for word in text.split(",")]


def main(words: Sequence[str] | None = None) -> None:
    """Train, judge, print; and write the table where asked to."""
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few steps: does it run at all?")
    parser.add_argument("--task", choices=["sh3_rev", "sort_inter"], default="sh3_rev")
    parser.add_argument("--steps", type=numbers, default=[60, 120], help="of short trainings")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table there too")
    given = parser.parse_args(words)
    size = ([2], 1, [4], 1) if given.quick else (given.steps, MORE, [4, 2, 1], 32)
    lines = []
    for line in table(given.task, *size):
        print(line, flush=True)
        lines.append(line)
    if given.write:
        given.write.write_text("\n".join([CAPTION, "", *lines]) + "\n", "utf-8")


if __name__ == "__main__":
    main()
