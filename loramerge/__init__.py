"""Merge, compress and inspect LoRA adapters in safetensors files, without the base model."""

import importlib
from typing import Any

from loramerge._version import __version__ as __version__


def __getattr__(name: str) -> Any:
    """Public names, resolved at their first use, so that importing stays light (PEP 562)."""
    # `from loramerge import public` would ask this function for "public" first
    return importlib.import_module("loramerge.public").public(name)


def __dir__() -> list[str]:
    """The public names."""
    names: list[str] = importlib.import_module("loramerge.public").names()
    return names
