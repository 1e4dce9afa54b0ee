"""Heavy libraries, imported at their first use: `loramerge --help` must not pay for them."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["array_api_torch", "np", "sklearn", "sklearn_cluster", "threadpoolctl", "torch"]


class Lazy(ModuleType):
    """A module that is imported when its first attribute is asked for."""

    def __getattr__(self, name: str) -> Any:
        module = importlib.import_module(self.__name__)
        self.__dict__.update(module.__dict__)
        return getattr(module, name)


if TYPE_CHECKING:
    import array_api_compat.torch as array_api_torch
    import numpy as np
    import sklearn
    import sklearn.cluster as sklearn_cluster
    import threadpoolctl
    import torch
else:
    array_api_torch = Lazy("array_api_compat.torch")
    np = Lazy("numpy")
    sklearn = Lazy("sklearn")
    sklearn_cluster = Lazy("sklearn.cluster")
    threadpoolctl = Lazy("threadpoolctl")
    torch = Lazy("torch")
