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
# The names PEFT, diffusers and MLX give the weights in a directory, beside checkpoints of others.
USUAL = (WEIGHTS, "pytorch_lora_weights.safetensors", "adapters.safetensors")
MAX_CONFIG = 1_000_000
PERMISSIONS = "check its path and permissions"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


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
    try:
        weights = _weights(path) if path.is_dir() else path
        if not weights.exists():
            raise AdapterError(f"{reference} does not exist.", _elsewhere(reference))
    except OSError as error:
        raise AdapterError(f"{reference} cannot be read: {error.strerror}.", PERMISSIONS) from None
    if weights.suffix in PICKLES:
        raise AdapterError(
            f"{weights} is a pickle ({weights.suffix}), which can run code when it is opened.",
            "save it as .safetensors: model.save_pretrained(..., safe_serialization=True)",
        )
    source = open_source(weights)
    config = _config(weights.parent / CONFIG)
    beside = weights.name != WEIGHTS
    found = _detect(source, reference, config if not beside else None)
    try:
        return found.read(Given(reference, source, config, beside, alpha))
    except AdapterError as error:
        if reference in error.message:
            raise
        raise AdapterError(f"{reference}: {error.message}", error.hint) from None


def _elsewhere(reference: str) -> str:
    """What may have been meant by a path that is not there."""
    parts = reference.split("/")
    if (
        len(parts) == 2
        and all(parts)
        and "." not in parts[0]
        and not parts[1].endswith(".safetensors")
    ):
        return (
            f"if it is on the Hub, fetch it first: hf download {reference} --local-dir {parts[1]}"
        )
    return f"see what is there: ls {Path(reference).parent}"


def _weights(directory: Path) -> Path:
    """The one weights file of a directory. Raises AdapterError when there is none or no telling."""
    for name in USUAL:
        if (directory / name).is_file():
            return directory / name
    files = sorted(directory.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        names = [str(file) for file in files]
        raise AdapterError(
            f"{directory} holds {len(files)} safetensors files: {listed(names)}.",
            f"name one of them, for example: {names[0]}",
        )
    for name in ("adapter_model.bin", "*.bin", "*.pt"):
        if pickles := sorted(directory.glob(name)):
            return pickles[0]
    deeper = sorted(directory.glob(f"*/{WEIGHTS}"))
    raise AdapterError(
        f"{directory} holds no adapter: no {WEIGHTS} and no other .safetensors file.",
        f"name the directory that does, for example: {deeper[0].parent}"
        if deeper
        else "name the directory that holds adapter_config.json",
    )


def _config(path: Path) -> Mapping[str, Any] | None:
    """The adapter_config.json beside a weights file, None without one."""
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_CONFIG:
        raise AdapterError(f"{path} is larger than {MAX_CONFIG:,} bytes.", "save the adapter again")
    try:
        config = json.loads(path.read_bytes().decode())
        json.dumps(config, ensure_ascii=False).encode()  # half a surrogate pair cannot be printed
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror}.", PERMISSIONS) from None
    except (ValueError, RecursionError):
        raise AdapterError(f"{path} is not JSON.", "save the adapter again") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path} is not a JSON object.", "save the adapter again")
    return config


def _detect(source: Source, reference: str, config: Mapping[str, Any] | None) -> Layout:
    """The one layout that explains every key; `config` is the file's own."""
    for found in layouts():
        if any(found.marks(key) for key in source.tensors):
            return found
    if config is not None and config.get("peft_type", "LORA") != "LORA":
        return layout("peft")  # which refuses it by its type
    if foreign := recognise(source.tensors):
        raise AdapterError(
            f"{reference} is in the {foreign.name} layout, which loramerge does not read yet.",
            foreign.hint,
        )
    unexplained = {
        found.name: [key for key in source.tensors if not found.explains(key)]
        for found in layouts()
        if not found.marked
    }
    name, left = min(unexplained.items(), key=lambda item: len(item[1]))
    if not left:
        return layout(name)
    if len(left) == len(source.tensors):
        raise AdapterError(
            f"{reference} is no LoRA in a layout loramerge knows; it holds {listed(left, 3)}.",
            "see: loramerge layouts",
        )
    raise AdapterError(
        f"{reference} looks like {name}, but these keys are not explained: {listed(left, 4)}.",
        "remove them from the file, or name the file they belong to",
    )
