"""Merge, compress and inspect LoRA adapters in safetensors files, without the base model."""

import importlib
from typing import Any

from loramerge._version import __version__ as __version__


def __getattr__(name: str) -> Any:
    """Public names, resolved at their first use, so that importing stays light (PEP 562)."""
    # `from loramerge import api` would ask this function for "api" first
    return importlib.import_module("loramerge.api").public(name)


def __dir__() -> list[str]:
    """The public names."""
    names: list[str] = importlib.import_module("loramerge.api").names()
    return names
