"""The kernels on torch tensors, whole batches at a time: CUDA, MPS, and the CPU for tests."""

from typing import TYPE_CHECKING, Literal, TypeAlias

from loramerge._lazy import np, torch

if TYPE_CHECKING:
    Tensor: TypeAlias = torch.Tensor
else:
    Tensor: TypeAlias = object


def bits(x: Tensor) -> Tensor:
    """The bits of float32 numbers, as they lie in memory."""
    return x.view(torch.int32)


def cholesky(G: Tensor) -> tuple[Tensor, Tensor]:
    """Lower L with G = L L^T, and ok [*b]; L is zero where G is not positive definite."""
    L, info = torch.linalg.cholesky_ex(G)
    ok = info == 0
    return torch.where(ok[..., None, None], L, torch.zeros_like(L)), ok


def gaussian(model: Tensor, rows: int, columns: int, seed: int) -> Tensor:
    """A standard normal matrix of a seed: NumPy's values, moved to the device."""
    values = np.random.default_rng(seed).standard_normal((rows, columns))
    return torch.from_numpy(values).to(device=model.device, dtype=model.dtype)


def inner(X: Tensor, Y: Tensor) -> Tensor:
    """X^T Y."""
    return X.mT @ Y


def ranks(x: Tensor) -> Tensor:
    """The place of each number in its row."""
    order = torch.argsort(x, dim=-1, stable=True)
    place = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device).expand(x.shape)
    return torch.empty_like(order, dtype=torch.int32).scatter_(-1, order, place)


def svd(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD."""
    U, s, Vh = torch.linalg.svd(X, full_matrices=False)
    return U, s, Vh


def tally(x: Tensor, bins: int) -> Tensor:
    """How often each whole number occurs."""
    return torch.bincount(x, minlength=bins)


def word() -> Literal["int64"]:
    """Unsigned words of 32 bits have neither shifts nor sums on the CPU."""
    return "int64"
