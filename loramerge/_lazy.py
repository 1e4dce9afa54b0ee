"""Heavy libraries, imported at their first use: `loramerge --help` must not pay for them."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = [
    "array_api_torch",
    "hub_errors",
    "hub_utils",
    "huggingface_hub",
    "np",
    "threadpoolctl",
    "torch",
    "yaml",
]


class Lazy(ModuleType):
    """A module that is imported when its first attribute is asked for."""

    def __getattr__(self, name: str) -> Any:
        module = importlib.import_module(self.__name__)
        self.__dict__.update(module.__dict__)
        return getattr(module, name)


if TYPE_CHECKING:
    import array_api_compat.torch as array_api_torch
    import huggingface_hub
    import huggingface_hub.errors as hub_errors
    import huggingface_hub.utils as hub_utils
    import numpy as np
    import threadpoolctl
    import torch
    import yaml
else:
    array_api_torch = Lazy("array_api_compat.torch")
    hub_errors = Lazy("huggingface_hub.errors")
    hub_utils = Lazy("huggingface_hub.utils")
    huggingface_hub = Lazy("huggingface_hub")
    np = Lazy("numpy")
    threadpoolctl = Lazy("threadpoolctl")
    torch = Lazy("torch")
    yaml = Lazy("yaml")
