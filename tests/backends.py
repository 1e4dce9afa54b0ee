"""The same numbers as arrays of another kind: NumPy, torch, array-api-strict."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from loramerge.adapter import LowRank
from loramerge.linalg import _numpy


@dataclass(frozen=True)
class Backend:
    """How to turn a NumPy array into one of this kind, and back."""

    put: Callable[[np.ndarray], Any]
    take: Callable[[Any], np.ndarray]

    def update(self, update: LowRank) -> LowRank:
        """The factors as arrays of this kind."""
        return LowRank(self.put(update.A), self.put(update.B))

    def back(self, update: LowRank) -> LowRank:
        """The factors as NumPy arrays."""
        return LowRank(self.take(update.A), self.take(update.B))


def _strict(x: np.ndarray) -> Any:
    import array_api_strict  # not there on every machine that has a GPU

    return array_api_strict.asarray(x)


BACKENDS = {
    "numpy": Backend(lambda x: x, lambda x: x),
    "torch": Backend(lambda x: torch.from_numpy(x.copy()), lambda x: x.numpy()),
    "cuda": Backend(lambda x: torch.from_numpy(x.copy()).cuda(), lambda x: x.cpu().numpy()),
    "strict": Backend(_strict, np.asarray),
}


def lend_kernels_to_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let array-api-strict compute with NumPy's kernels: everything outside them stays strict."""

    def lent(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: Any, *rest: Any) -> Any:
            if isinstance(x, np.ndarray):
                return kernel(x, *rest)
            found = kernel(*(np.asarray(y) if isinstance(y, type(x)) else y for y in (x, *rest)))
            return tuple(map(_strict, found)) if isinstance(found, tuple) else _strict(found)

        return call

    for name in ("bits", "cholesky", "gaussian", "inner", "ranks", "svd", "tally"):
        monkeypatch.setattr(_numpy, name, lent(getattr(_numpy, name)))
