"""Stored keys and what they mean: grouping by module, and the checks every layout shares."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loramerge.adapter import Kind, TensorInfo
from loramerge.errors import AdapterError, listed

__all__ = ["Grammar", "Pair", "check_pairs", "pair_shape"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """A table of roles: each a regular expression with a group named `module`."""

    roles: tuple[tuple[str, re.Pattern[str]], ...]

    def parse(self, key: str) -> tuple[str, str] | None:
        """(module, role) of a key, or None if no role explains it."""
        for role, pattern in self.roles:
            if match := pattern.fullmatch(key):
                return match["module"], role
        return None

    def group(self, keys: Iterable[str]) -> dict[str, dict[str, str]]:
        """Keys by module and role, in file order. Raises AdapterError when two keys coincide."""
        found: dict[str, dict[str, str]] = {}
        for key in keys:
            if parsed := self.parse(key):
                module, role = parsed
                roles = found.setdefault(module, {})
                if role in roles:
                    raise AdapterError(
                        f"{roles[role]} and {key} are the same tensor of one module."
                    )
                roles[role] = key
        return found


@dataclass(frozen=True, slots=True)
class Pair:
    """The two factors of one module as shapes: enough to describe it."""

    kind: Kind
    out_features: int
    in_features: int
    rank: int
    kernel: tuple[int, ...]


def check_pairs(groups: Mapping[str, Mapping[str, str]], a: str, b: str, where: str) -> None:
    """Raise AdapterError listing every module with one factor but not the other."""
    alone = [roles[a] for roles in groups.values() if a in roles and b not in roles]
    alone += [roles[b] for roles in groups.values() if b in roles and a not in roles]
    if alone:
        raise AdapterError(
            f"{where}: {len(alone)} tensors lack their other half: {listed(alone, 4)}.",
            "the file is incomplete; save or download it again",
        )


def pair_shape(key: str, A: TensorInfo, B: TensorInfo, embedding: bool = False) -> Pair:
    """What A [r, in, *kernel] and B [out, r, 1...] describe. Raises AdapterError if nothing."""
    if len(A.shape) < 2 or len(B.shape) < 2 or 0 in (*A.shape, *B.shape):
        raise AdapterError(
            f"{key} has the shapes {list(A.shape)} and {list(B.shape)}: empty or flat factors are "
            "what DeepSpeed ZeRO-3 or FSDP saves before gathering.",
            "gather the weights before saving (zero_to_fp32, or FSDP full state dict)",
        )
    rank, kernel = A.shape[0], A.shape[2:]
    if B.shape[1] != rank or any(size != 1 for size in B.shape[2:]):
        raise AdapterError(f"{key}: A {list(A.shape)} and B {list(B.shape)} do not multiply.")
    columns = A.shape[1]
    for size in kernel:
        columns *= size
    kind: Kind = "embedding" if embedding else "conv" if kernel else "linear"
    return Pair(kind, B.shape[0], columns, rank, kernel)
