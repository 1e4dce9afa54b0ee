"""Adapters of the tiny llama as trainers write them, and everything we make of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.torch import load_file

from tests.build import Pair, write_peft
from tests.consumers.llama import LAYERS, SHAPES
from tests.oracle.tiny import PREFIX, Deltas, stored_ranks, truncated, weighted, worst
from tests.typed import typed

WEIGHTS = [0.5, 2.0, -1.0]
WEIGHTS_FILE, ENDS = "adapter_model.safetensors", (".lora_A.weight", ".lora_B.weight")


class Made(NamedTuple):
    """An adapter on disk, and its delta weights in float64."""

    path: Path
    deltas: Deltas


@dataclass(frozen=True, slots=True)
class Source:
    """How one adapter was trained: its targets, ranks, and what its config says of the scale."""

    ranks: Mapping[str, int]
    scalings: Mapping[str, float]
    config: Mapping[str, Any]


ATTENTION, FEED = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
SOURCES = {
    "plain": Source(
        {"q_proj": 4, "v_proj": 4, "down_proj": 4},
        {"q_proj": 2.0, "v_proj": 2.0, "down_proj": 2.0},
        {"r": 4, "lora_alpha": 8},
    ),
    "rslora": Source(
        dict.fromkeys((*ATTENTION, *FEED), 6),
        dict.fromkeys((*ATTENTION, *FEED), 6 / 6**0.5),
        {"r": 6, "lora_alpha": 6, "use_rslora": True},
    ),
    "patterns": Source(
        {"q_proj": 2, "k_proj": 4, "o_proj": 4, "gate_proj": 4, "up_proj": 4},
        {"q_proj": 2.0, "k_proj": 3.0, "o_proj": 1.0, "gate_proj": 1.0, "up_proj": 1.0},
        {"r": 4, "lora_alpha": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 12}},
    ),
    "ranks": Source(
        {"q_proj": 2, "v_proj": 4, "down_proj": 4},
        {"q_proj": 4.0, "v_proj": 2.0, "down_proj": 2.0},
        {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2}},
    ),
}
MERGED = ("plain", "rslora", "patterns")


def factors_of(source: Source, seed: int) -> dict[str, Pair]:
    """Random A and B of every target of every layer."""
    rng = np.random.default_rng(seed)
    found: dict[str, Pair] = {}
    for layer in range(LAYERS):
        for name, (out, into) in SHAPES.items():
            if rank := source.ranks.get(leaf(name)):
                A = rng.standard_normal((rank, into)) / np.sqrt(into)
                B = 0.2 * rng.standard_normal((out, rank))
                found[f"model.layers.{layer}.{name}"] = A.astype("f4"), B.astype("f4")
    return found


def leaf(module: str) -> str:
    """The last word of a module's path."""
    return module.rpartition(".")[2]


def trained(source: Source, path: Path, seed: int, **config: Any) -> Made:
    """An adapter with random factors, written with the safetensors library."""
    factors = factors_of(source, seed)
    deltas = {
        name: source.scalings[leaf(name)] * (B.astype("f8") @ A.astype("f8"))
        for name, (A, B) in factors.items()
    }
    facts = {"target_modules": sorted(source.ranks), "task_type": "CAUSAL_LM", **source.config}
    return Made(write_peft(path, factors, **{**facts, **config}), deltas)


Wanted = Callable[[Mapping[str, Deltas], Mapping[str, int]], Deltas]


def _sum(deltas: Mapping[str, Deltas]) -> Deltas:
    return weighted([deltas[name] for name in MERGED], WEIGHTS)


def _cut(deltas: Deltas, ranks: Mapping[str, int]) -> Deltas:
    return {name: truncated(deltas[name], rank) for name, rank in ranks.items()}


SIGNED = tuple(word for weight in WEIGHTS for word in ("-w", str(weight)))
# What is typed -> its delta weights, from those of the sources and the ranks that were stored.
FORMS: dict[str, tuple[tuple[str, ...], Wanted]] = {
    "merge, uniform": (("cat", *MERGED, *SIGNED), lambda deltas, ranks: _sum(deltas)),
    "merge, pattern": (
        ("cat", *MERGED, *SIGNED, "--layout", "pattern"),
        lambda deltas, ranks: _sum(deltas),
    ),
    "merge, float16": (
        ("cat", *MERGED, *SIGNED, "--save-dtype", "float16"),
        lambda deltas, ranks: _sum(deltas),
    ),
    "merge, bfloat16": (
        ("cat", *MERGED, *SIGNED, "--save-dtype", "bfloat16"),
        lambda deltas, ranks: _sum(deltas),
    ),
    "merge, cut to rank 5": (
        ("arithmetic", *MERGED, *SIGNED, "--rank", "5"),
        lambda deltas, ranks: _cut(_sum(deltas), ranks),
    ),
    "squeezed rsLoRA": (
        ("squeeze", "rslora", "--rank", "3"),
        lambda deltas, ranks: _cut(deltas["rslora"], ranks),
    ),
    "squeezed patterns, pattern": (
        ("squeeze", "patterns", "--energy", "0.9"),
        lambda deltas, ranks: _cut(deltas["patterns"], ranks),
    ),
    "converted": (
        ("convert", "patterns", "--to", "peft"),
        lambda deltas, ranks: deltas["patterns"],
    ),
}


# Half a unit in the last place of every entry: what storing factors in so few bits costs each.
STORED = {"float16": 2**-11, "bfloat16": 2**-8}


def sources(directory: Path) -> dict[str, Made]:
    """Every adapter as it was trained."""
    return {
        name: trained(source, directory / name, seed)
        for seed, (name, source) in enumerate(SOURCES.items())
    }


def form(name: str, given: Mapping[str, Made], out: Path) -> Made:
    """One form on disk, with the delta weights it must have: of narrow factors, their product."""
    words, wanted = FORMS[name]
    run(*(given[word].path if word in given else word for word in words), "-o", out)
    deltas = wanted({source: one.deltas for source, one in given.items()}, stored_ranks(out))
    if words[-1] not in STORED:
        return Made(out, deltas)
    products = product(out)
    assert worst(products, deltas) < 2 * STORED[words[-1]]
    return Made(out, products)


def product(path: Path) -> Deltas:
    """B @ A of the stored factors in float64, the scale being 1."""
    tensors = {key: x.double().numpy() for key, x in load_file(path / WEIGHTS_FILE).items()}
    return {
        key.removeprefix(PREFIX).removesuffix(ENDS[0]): tensors[key.replace(*ENDS)] @ A
        for key, A in tensors.items()
        if key.endswith(ENDS[0])
    }


def run(*words: str | Path) -> None:
    """The command line, which must succeed."""
    done = typed(*words)
    assert done.code == 0, done.err
