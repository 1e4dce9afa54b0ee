"""From what a user typed to an Adapter: find the files, tell the layout, read the header."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loramerge.adapter import Adapter
from loramerge.errors import AdapterError, UsageError, listed
from loramerge.io._foreign import recognise
from loramerge.io._layout import Given, Layout
from loramerge.io._source import Source, open_source
from loramerge.registry import layout_names, load

__all__ = ["layout", "layouts", "open_adapter"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MAX_CONFIG = 1_000_000


def layouts() -> list[Layout]:
    """Every layout, by name."""
    return [load(name).LAYOUT for name in layout_names()]


def layout(name: str) -> Layout:
    """One layout. Raises UsageError naming the others."""
    if name not in layout_names():
        raise UsageError(f"There is no layout '{name}'.", f"one of: {', '.join(layout_names())}")
    found: Layout = load(name).LAYOUT
    return found


def open_adapter(reference: str, alpha: float | None = None) -> Adapter:
    """Open a directory or a .safetensors file; only headers and configs are read.

    Raises AdapterError with the reason for anything that is not a readable adapter.
    """
    path = Path(reference).expanduser()
    if not path.exists():
        raise AdapterError(f"{reference} does not exist.", "check the path, or list it with: ls")
    weights = _weights(path) if path.is_dir() else path
    if weights.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise AdapterError(
            f"{reference} is a pickle ({weights.suffix}), which can run code when it is opened.",
            "save it as .safetensors (PEFT: save_pretrained(safe_serialization=True))",
        )
    source = open_source(weights)
    config = _config(weights.parent / CONFIG, source, certain=path.is_dir())
    found = _detect(source, reference, config)
    return found.read(Given(reference, source, source.metadata, config, alpha))


def _weights(directory: Path) -> Path:
    """The one weights file of a directory. Raises AdapterError when there is none or no telling."""
    if (directory / WEIGHTS).is_file():
        return directory / WEIGHTS
    files = sorted(directory.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        names = [str(file) for file in files]
        raise AdapterError(
            f"{directory} holds {len(files)} safetensors files: {listed(names)}.",
            f"name one of them, for example: {names[0]}",
        )
    pickles = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt"))
    if pickles:
        return pickles[0]
    raise AdapterError(
        f"{directory} holds no adapter: no {WEIGHTS} and no other .safetensors file.",
        "name the directory that holds adapter_config.json",
    )


def _config(path: Path, source: Source, certain: bool) -> Mapping[str, Any] | None:
    """The adapter_config.json of a weights file: beside a bare file only if it explains it."""
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_CONFIG:
        raise AdapterError(f"{path} is larger than {MAX_CONFIG:,} bytes.")
    try:
        config = json.loads(path.read_bytes())
    except ValueError:
        raise AdapterError(f"{path} is not JSON.") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path} is not a JSON object.")
    if certain or source.path.name == WEIGHTS:
        return config
    embedded = "lora_adapter_metadata" in source.metadata
    return config if not embedded and _matches(config, source) else None


def _matches(config: Mapping[str, Any], source: Source) -> bool:
    """Whether a config beside a bare file states this file's ranks and targets."""
    ranks = {
        info.shape[0] for key, info in source.tensors.items() if ".lora_A" in key and info.shape
    }
    stated = {config.get("r"), *(config.get("rank_pattern") or {}).values()}
    targets = config.get("target_modules")
    if not isinstance(targets, list):
        return ranks == stated
    stems = [key.split(".lora_A")[0] for key in source.tensors if ".lora_A" in key]
    return (
        bool(ranks)
        and ranks <= stated
        and all(any(stem.endswith("." + target) for target in targets) for stem in stems)
    )


def _detect(source: Source, reference: str, config: Mapping[str, Any] | None) -> Layout:
    """The one layout that explains every key."""
    kind = (config or {}).get("peft_type")
    if kind is not None and kind != "LORA":
        return layout("peft")  # which refuses it by its type
    foreign = recognise(source.tensors)
    if foreign:
        raise AdapterError(
            f"{reference} is in the {foreign.name} layout, which loramerge does not read yet.",
            foreign.hint,
        )
    unexplained = {
        found.name: [key for key in source.tensors if not found.explains(key)]
        for found in layouts()
    }
    name, left = min(unexplained.items(), key=lambda item: len(item[1]))
    if not left:
        return layout(name)
    if len(left) == len(source.tensors):
        raise AdapterError(
            f"{reference} is no LoRA in a layout loramerge knows; it holds "
            f"{listed(list(source.tensors), 3)}.",
            "see: loramerge layouts",
        )
    raise AdapterError(
        f"{reference} looks like {name}, but these keys are not explained: {listed(left, 4)}.",
        "remove them from the file, or name the file they belong to",
    )
