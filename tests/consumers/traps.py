"""Adapters of the tiny llama that some program takes without a word, and computes otherwise."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.consumers.forms import SOURCES, Made, trained
from tests.consumers.llama import WEIGHTS

FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."


def rewritten(one: Made, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Made:
    """The adapter with other tensors."""
    file = one.path / FILE
    save_file(change(load_file(file)), file, {"format": "pt"})
    return one


def bare(path: Path) -> Made:
    """Keys without PEFT's prefix."""
    return rewritten(
        trained(SOURCES["plain"], path, 1),
        lambda tensors: {key.removeprefix(PREFIX): x for key, x in tensors.items()},
    )


def unnamed(path: Path) -> Made:
    """One of its modules is no target of its config."""
    return trained(SOURCES["plain"], path, 1, target_modules=["q_proj", "v_proj"])


def dora(path: Path) -> Made:
    """DoRA: rows of weight plus update, made as long as the magnitudes say."""
    one = trained(SOURCES["plain"], path, 1, use_dora=True)
    rng = np.random.default_rng(3)
    lengths = {name: rng.uniform(0.5, 2, len(delta)) for name, delta in one.deltas.items()}
    deltas = {}
    for name, delta in one.deltas.items():
        weight = WEIGHTS[f"{name}.weight"].astype("f8")
        rows = np.linalg.norm(weight + delta, axis=1, keepdims=True)
        deltas[name] = lengths[name].astype("f4")[:, None] / rows * (weight + delta) - weight
    magnitudes = {
        f"{PREFIX}{name}.lora_magnitude_vector": x.astype("f4") for name, x in lengths.items()
    }
    return rewritten(Made(one.path, deltas), lambda tensors: {**tensors, **magnitudes})


def head(path: Path) -> Made:
    """A head of its own beside the LoRA."""
    one = trained(SOURCES["plain"], path, 1, modules_to_save=["lm_head"])
    weight = WEIGHTS["lm_head.weight"]
    new = weight[::-1].copy()
    deltas = {**one.deltas, "lm_head": new.astype("f8") - weight}
    return rewritten(
        Made(one.path, deltas), lambda tensors: {**tensors, f"{PREFIX}lm_head.weight": new}
    )


def source(name: str) -> Callable[[Path], Made]:
    """One of the sources as it was trained."""
    return lambda path: trained(SOURCES[name], path, 1)


# What to look out for -> how such an adapter is made.
TRAPS: dict[str, Callable[[Path], Made]] = {
    "one scale": source("plain"),
    "rsLoRA": source("rslora"),
    "alpha_pattern": source("patterns"),
    "rank_pattern": source("ranks"),
    "keys without a prefix": bare,
    "a module that is no target": unnamed,
    "DoRA": dora,
    "a head beside": head,
}
