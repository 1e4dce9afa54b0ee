"""A base model, LoRA adapters truly trained on known tasks, and how much of them a merge can do.

python benchmarks/testbed.py train --out DIR [--tasks hard|easy|fresh|NAME...] [--init shared] ...
python benchmarks/testbed.py evaluate [--testbed DIR] [--suite NAME] [--split val] ADAPTER...

A testbed is a directory: base/, a directory of adapters for each suite, eval.safetensors.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from exactmatch import load_base, report, score
from programs import OPERATIONS, SUITES, compositions, curriculum, sample
from safetensors.torch import load_file, save_file
from trainer import SCALING, Factors, Job, generator, train_adapters, train_base
from transformers import LlamaForCausalLM
from transformers.utils import logging

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "testbed"
SIZES = {"test": 512, "val": 256}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FRESH = 8
# A fresh task is one the base has no idea of: at most this share of so many answers is right.
UNKNOWN = 0.05
TRIED = 100


def train(arguments: argparse.Namespace) -> None:
    """Train what is missing of a testbed: its base, the adapters of one suite, their data."""
    out, device = arguments.out, arguments.device
    if not (out / "base").exists():
        _provide_base(arguments)
    base = load_base(out)
    tasks = _tasks(arguments, base)
    jobs = _jobs(arguments, tasks)
    taken = [name for name in jobs if (out / arguments.suite / name).exists()]
    if taken:
        raise SystemExit(f"{arguments.suite} holds {', '.join(taken)} already: another --suite")
    print(f"training {len(jobs)} adapters on {device}: {', '.join(jobs)}", flush=True)
    trained, early = train_adapters(
        base,
        list(jobs.values()),
        arguments.steps,
        arguments.batch,
        arguments.samples,
        device,
        arguments.lr,
        arguments.checkpoint,
    )
    for suite, adapters in ((f"{arguments.suite}_early", early), (arguments.suite, trained)):
        for name, factors in zip(jobs, adapters, strict=bool(adapters)):
            save_adapter(out / suite / name, factors, jobs[name].rank)
    _add_data(out / "eval.safetensors", tasks)


def _provide_base(arguments: argparse.Namespace) -> None:
    directory = arguments.out / "base"
    if arguments.base:
        shutil.copytree(arguments.base, directory)
        return
    print(f"training the base on {arguments.device}", flush=True)
    model = train_base(
        arguments.base_steps,
        arguments.base_batch,
        arguments.samples,
        arguments.seed,
        arguments.device,
    )
    model.to(torch.bfloat16).save_pretrained(directory)


def _tasks(arguments: argparse.Namespace, base: LlamaForCausalLM) -> list[str]:
    """The programs asked for. Raises SystemExit for one that is none, or that the base knows."""
    names: list[str] = arguments.tasks
    if names == ["fresh"]:
        return fresh(base, arguments.seed)
    names = list(SUITES.get(names[0], names)) if len(names) == 1 else names
    unknown = set(names) - set(compositions())
    if unknown:
        raise SystemExit(
            f"{', '.join(sorted(unknown))}: no program of two different primitives out of "
            f"{' '.join(OPERATIONS)}; the second is not copy"
        )
    known = sorted(set(names) & set(curriculum()[0]))
    if known:
        raise SystemExit(f"the base is trained on {', '.join(known)} itself: choose other --tasks")
    return names


def fresh(base: LlamaForCausalLM, seed: int) -> list[str]:
    """Eight programs of neither suite, unknown to the base, no primitive in more than two."""
    draw = generator("cpu", "fresh", seed)
    held = [name for name in curriculum()[1] if not any(name in suite for suite in SUITES.values())]
    found: list[str] = []
    for place in torch.randperm(len(held), generator=draw).tolist():
        used = "_".join(found).split("_")
        if any(used.count(part) > 1 for part in held[place].split("_")):
            continue
        if score(base, sample(held[place], TRIED, draw)).exact <= UNKNOWN:
            found.append(held[place])
        if len(found) == FRESH:
            break
    return sorted(found)


def _jobs(arguments: argparse.Namespace, tasks: Sequence[str]) -> dict[str, Job]:
    """What to train, by the name of its directory; several ranks are given out in turn."""
    groups = {f"joint{len(tasks)}": tasks} if arguments.joint else {task: [task] for task in tasks}
    seed, ranks = str(arguments.seed), arguments.rank
    return {
        name: Job(
            programs=tuple(programs),
            rank=ranks[place % len(ranks)],
            seed=seed,
            initial=seed if arguments.init == "shared" else f"{seed} {name}",
        )
        for place, (name, programs) in enumerate(groups.items())
    }


def save_adapter(directory: Path, factors: Factors, rank: int) -> None:
    """A PEFT directory in float16; the header says rank and alpha too, for bare copies."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "../../base",
        "r": rank,
        "lora_alpha": int(SCALING * rank),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "target_modules": PROJECTIONS,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    says = "alpha_pattern base_model_name_or_path fan_in_fan_out lora_alpha r rank_pattern"
    facts = json.dumps({name: config[name] for name in [*says.split(), "use_rslora"]})
    tensors = {
        f"base_model.model.{module}.lora_{letter}.weight": factor.half().contiguous()
        for module, pair in factors.items()
        for letter, factor in zip("AB", pair, strict=True)
    }
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    header = {"format": "pt", "lora_adapter_metadata": facts}
    save_file(tensors, directory / "adapter_model.safetensors", header)


def _add_data(path: Path, tasks: Sequence[str]) -> None:
    """Sequences to judge each new task on; those stored already stay as they are."""
    stored = load_file(path) if path.exists() else {}
    for task in tasks:
        for split, count in SIZES.items():
            rows = sample(task, count, generator("cpu", split, task)).to(torch.uint8)
            stored.setdefault(f"{split}/{task}", rows)
    save_file(stored, path)


def evaluate(arguments: argparse.Namespace) -> None:
    """Print what adapters do on a suite's tasks."""
    report(
        arguments.testbed,
        arguments.suite,
        arguments.adapters,
        arguments.split,
        arguments.n,
        arguments.singles,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    trains = commands.add_parser("train", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    trains.set_defaults(command=train)
    on = "cuda" if torch.cuda.is_available() else "cpu"
    add = trains.add_argument
    add("--out", type=Path, required=True, help="the testbed; what it has is kept")
    add("--base", type=Path, help="copy this base instead of training one")
    add("--base-steps", type=int, default=10_000, help="steps of the base")
    add("--base-batch", type=int, default=2048, help="sequences a step of the base")
    add("--suite", default="adapters", help="directory of the adapters inside the testbed")
    add("--tasks", nargs="+", default=["hard"], help="hard, easy, fresh, or programs")
    add("--joint", action="store_true", help="one adapter for all the tasks")
    add("--rank", type=int, nargs="+", default=[16], help="several are given out in turn")
    add("--init", choices=["separate", "shared"], default="separate", help="of A")
    add("--lr", type=float, default=1e-3, help="peak learning rate; 3e-4 is gentle")
    add("--steps", type=int, default=800, help="steps of the adapters")
    add("--checkpoint", type=int, default=0, help="save as SUITE_early after so many of them")
    add("--batch", type=int, default=64, help="sequences a step for each adapter")
    add("--samples", type=int, default=40_000, help="training sequences drawn for each program")
    add("--seed", type=int, default=0, help="of initial values, data and fresh tasks")
    add("--device", default=on)
    judges = commands.add_parser("evaluate", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    judges.set_defaults(command=evaluate)
    add = judges.add_argument
    add("adapters", type=Path, nargs="*", metavar="ADAPTER", help="PEFT directories")
    add("--testbed", type=Path, default=FIXTURE)
    add("--suite", default="adapters", help="the tasks to judge on: adapters or adapters_easy")
    add("--split", choices=SIZES, default="test", help="choose constants on val, report test")
    add("--n", type=int, default=SIZES["test"], help="sequences for each task")
    add("--singles", action="store_true", help="each of the suite's adapters on every task")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line."""
    logging.disable_progress_bar()
    arguments = _parser().parse_args(words)
    arguments.command(arguments)


if __name__ == "__main__":
    main()
