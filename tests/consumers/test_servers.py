"""vLLM, SGLang and Ollama, which do not run here: their loaders' rules, written down from source.

vLLM: lora_model.py and peft_helper.py; SGLang 0.5.23: lora.py and mem_pool.py; Ollama: convert.go
and convert_llama_adapter.go, and llama.cpp, which computes for it.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.consumers.deviations import compare
from tests.consumers.forms import FORMS, Made, leaf
from tests.consumers.llama import HEAD, HEADS, KEYS, WEIGHTS, logits
from tests.consumers.traps import TRAPS
from tests.consumers.verdicts import MAX_RANK, judge
from tests.oracle.tiny import Deltas

pytestmark = pytest.mark.consumers
# Factors are rounded to float32, which costs 8e-7; everything else is in float64.
FLOAT32 = 2e-6
PREFIX = "base_model.model."
# Stacked into one layer, where some may be missing.
STACKS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
MAY_MISS = ("k_proj", "up_proj")


def config_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "adapter_config.json").read_text())
    return found


def factors_of(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Module -> its A and B in float64; any other key is refused."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in load_file(path / "adapter_model.safetensors").items():
        stem, dot, role = key.removesuffix(".weight").rpartition(".lora_")
        if not dot or role not in ("A", "B") or not key.endswith(".weight"):
            raise ValueError(f"{key} is unsupported LoRA weight")
        found.setdefault(stem.removeprefix(PREFIX), {})[role] = tensor.astype("f8")
    return found


def in_vllm(path: Path) -> Deltas:
    config = config_of(path)
    if config.get("modules_to_save") or config.get("use_dora"):
        raise ValueError("modules_to_save and DoRA are not supported")
    if config["r"] > MAX_RANK or config.get("bias", "none") != "none":
        raise ValueError("rank too high, or biases")
    root = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    scaling = config["lora_alpha"] / root
    return {name: scaling * (f["B"] @ f["A"]) for name, f in factors_of(path).items()}


def in_sglang(path: Path) -> Deltas:
    config = config_of(path)
    r, scaling = config["r"], config["lora_alpha"] / config["r"]
    if config.get("use_dora"):
        raise ValueError("DoRA is not supported")
    targets = {leaf(target) for target in config["target_modules"]}
    factors = factors_of(path)
    deltas: Deltas = {}
    for name, own in factors.items():
        stack = next((names for names in STACKS if leaf(name) in names), (leaf(name),))
        for other in stack:
            there = name.removesuffix(leaf(name)) + other in factors
            if not there and other not in MAY_MISS:
                raise KeyError(f"{name} without {other}")
        if own["A"].shape[0] != r or own["B"].shape[1] != r or leaf(name) not in targets:
            raise ValueError(f"{name} does not fit its buffer")
        deltas[name] = scaling * (own["B"] @ own["A"])
    return deltas


def in_ollama(path: Path) -> Deltas:
    alpha = config_of(path)["lora_alpha"]
    if not isinstance(alpha, int):
        raise TypeError("lora_alpha is unmarshalled into a uint32")
    deltas: Deltas = {}
    for name, own in factors_of(path).items():
        A, B = own["A"], own["B"]
        A = A.T if A.shape[0] > A.shape[1] else A
        B = B.T if B.shape[0] < B.shape[1] else B
        if A.shape[1] != WEIGHTS[f"{name}.weight"].shape[1]:
            raise ValueError(f"{name} does not fit its base")
        turned = leaf(name) in ("q_proj", "k_proj")
        if turned:  # by the heads of queries, as if A [r, in] were [in, r]
            A = _by_pairs(A.reshape(A.T.shape), HEADS, 2).reshape(A.shape)
        delta = alpha / A.shape[0] * (B @ A)
        heads = HEADS if leaf(name) == "q_proj" else KEYS
        # The rows of a GGUF's weight, in the order of Hugging Face again.
        deltas[name] = _by_pairs(delta, heads, HEAD // 2) if turned else delta
    return deltas


def _by_pairs(x: np.ndarray, heads: int, first: int) -> np.ndarray:
    """The rows of each head as [first, rest], then as [rest, first]."""
    return x.reshape(heads, first, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape)


SERVERS: Mapping[str, Callable[[Path], Deltas]] = {
    "vllm": in_vllm,
    "sglang": in_sglang,
    "ollama": in_ollama,
}
UNIFORM = ("merge, uniform", "merge, cut to rank 5", "squeezed rsLoRA")


# All of them adapt queries, which Ollama does not read right.
@pytest.mark.parametrize("server", ["vllm", "sglang"])
@pytest.mark.parametrize("form", UNIFORM)
def test_by_its_rules_it_loads_uniform_forms(
    server: str, form: str, forms: Mapping[str, Made]
) -> None:
    one = forms[form]
    found = logits(SERVERS[server](one.path))
    what, versions = f"{form} (by its rules)", "as read in its source"
    compare(server, versions, what, found, logits(one.deltas), logits(), FLOAT32)


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("form", [form for form in FORMS if "float16" not in form])
def test_verify_says_what_the_rules_make_of_every_form(
    server: str, form: str, forms: Mapping[str, Made], tmp_path: Path
) -> None:
    one = forms[form]
    path = tmp_path / "form"
    path.symlink_to(one.path)
    wanted, without = logits(one.deltas), logits()
    judge(server, path, lambda p: logits(SERVERS[server](p)), wanted, without, FLOAT32)


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("trap", TRAPS)
def test_verify_says_what_the_rules_make_of_a_trap(server: str, trap: str, tmp_path: Path) -> None:
    one = TRAPS[trap](tmp_path / "a")
    wanted, without = logits(one.deltas), logits()
    judge(server, one.path, lambda p: logits(SERVERS[server](p)), wanted, without, FLOAT32)
