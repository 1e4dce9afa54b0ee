"""Tiny adapters on disk, written with the safetensors library and nothing of ours."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

Pair = tuple[np.ndarray, np.ndarray]
PREFIX = "base_model.model."


def write_peft(
    path: Path,
    modules: Mapping[str, Pair],
    *,
    r: int | None = None,
    lora_alpha: float | None = None,
    dtype: str = "float32",
    embeddings: Collection[str] = (),
    extras: Mapping[str, np.ndarray] | None = None,
    metadata: Mapping[str, str] | None = None,
    **config: Any,
) -> Path:
    """A PEFT directory of {module: (A [r, in, ...], B [out, r, ...])}.

    A path that ends in .safetensors becomes a bare file without a config. r is the first module's
    rank and lora_alpha is r unless given. `embeddings` names the modules stored as such; `extras`
    are further tensors by their full key, in their own dtype.
    """
    tensors = {}
    for module, (A, B) in modules.items():
        pattern = "lora_embedding_{}" if module in embeddings else "lora_{}.weight"
        for letter, factor in (("A", A), ("B", B)):
            tensors[f"{PREFIX}{module}.{pattern.format(letter)}"] = factor
    r = next(iter(modules.values()))[0].shape[0] if r is None else r
    file = path
    if path.suffix != ".safetensors":
        path.mkdir(parents=True, exist_ok=True)
        facts = {
            "peft_type": "LORA",
            "r": r,
            "lora_alpha": r if lora_alpha is None else lora_alpha,
            "target_modules": sorted(modules),
            **config,
        }
        (path / "adapter_config.json").write_text(json.dumps(facts, indent=2))
        file = path / "adapter_model.safetensors"
    save(file, tensors, dtype, extras, {"format": "pt", **(metadata or {})})
    return path


def write_kohya(
    path: Path,
    modules: Mapping[str, tuple[np.ndarray, np.ndarray, "float | np.ndarray | None"]],
    *,
    dtype: str = "float32",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A kohya file of {name: (down, up, alpha)}.

    An alpha that is a number is stored as kohya does, 0-d in the file's dtype; an array is stored
    as it is; None leaves it out.
    """
    tensors, kept = {}, {}
    for name, (down, up, alpha) in modules.items():
        tensors[f"{name}.lora_down.weight"] = down
        tensors[f"{name}.lora_up.weight"] = up
        if isinstance(alpha, np.ndarray):
            kept[f"{name}.alpha"] = alpha
        elif alpha is not None:
            tensors[f"{name}.alpha"] = np.asarray(alpha)
    save(path, tensors, dtype, kept, metadata)
    return path


def save(
    file: Path,
    tensors: Mapping[str, np.ndarray],
    dtype: str,
    kept: Mapping[str, np.ndarray] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """One safetensors file; `tensors` are cast to dtype (bfloat16 by torch), `kept` are not."""
    file.parent.mkdir(parents=True, exist_ok=True)
    facts = dict(metadata) if metadata else None
    if dtype != "bfloat16":
        cast = {key: np.asarray(x, dtype, order="C") for key, x in tensors.items()}
        save_file({**cast, **(kept or {})}, file, facts)
        return
    import torch
    from safetensors.torch import save_file as save_torch

    rounded = {key: torch.tensor(x).to(torch.bfloat16) for key, x in tensors.items()}
    exact = {key: torch.tensor(x) for key, x in (kept or {}).items()}
    save_torch({**rounded, **exact}, file, facts)


def read_deltas(path: Path) -> dict[str, np.ndarray]:
    """Delta weights of a PEFT directory in float64, as PEFT computes them for Linear layers."""
    config = json.loads((path / "adapter_config.json").read_text())
    stored = load_file(path / "adapter_model.safetensors")
    deltas = {}
    for key, A in stored.items():
        if key.endswith(".lora_A.weight"):
            stem = key.removesuffix(".lora_A.weight")
            B = stored[f"{stem}.lora_B.weight"].astype(np.float64)
            scaling = config["lora_alpha"] / A.shape[0]
            deltas[stem.removeprefix(PREFIX)] = scaling * (B @ A.astype(np.float64))
    return deltas
