"""Stored keys and what they mean: grouping by module, and the checks every layout shares."""

import math
import re
from collections.abc import Iterable, Mapping

from msgspec import Struct
from msgspec.structs import replace

from loramerge.adapter import Kind, Module, TensorInfo, Variant
from loramerge.errors import AdapterError, listed
from loramerge.io._source import FLOATS, QUANTISED, Source

__all__ = [
    "BAKE",
    "DECOMPOSED",
    "INCOMPLETE",
    "Grammar",
    "alpha_of",
    "check_owners",
    "check_pairs",
    "dora",
    "factor_shapes",
    "kind_of",
    "pair",
    "scaled",
]

# Far above any LoRA; what claims more is damaged or an attack.
MAX_RANK = 65536
# What models call their embeddings, whose factors some layouts store as those of any layer.
EMBEDDINGS = ("embed_tokens", "embeddings", "wte", "word_embeddings")
# What makes DoRA more than a sum, and what to do about it.
DECOMPOSED = "its magnitudes act on the sum of base weight and update, which needs the base model"
BAKE = "make plain LoRA of it: loramerge bake ADAPTER --base MODEL --rank 16"
INCOMPLETE = "the file is incomplete: save it or download it again"


class Grammar(Struct, frozen=True):
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
                        f"{roles[role]} and {key} are the same tensor of one module.",
                        "save each adapter into a file of its own",
                    )
                roles[role] = key
        return found


def alpha_of(source: Source, roles: Mapping[str, str]) -> float:
    """The stored alpha of a module, of any dtype and as 0-d or one element; 0 without one."""
    alpha = source.scalar(roles["alpha"]) if "alpha" in roles else 0.0
    if not math.isfinite(alpha):
        raise AdapterError(
            f"{source.path}: {roles['alpha']} is {alpha}.", "use an earlier checkpoint"
        )
    return alpha


def dora(
    groups: Mapping[str, Mapping[str, str]], role: str, hint: str = BAKE
) -> tuple[Variant, ...]:
    """DoRA, where some module has magnitudes, which are stored under this role."""
    if not any(role in roles for roles in groups.values()):
        return ()
    return (Variant(f"DoRA ({role})", DECOMPOSED, hint),)


def check_pairs(groups: Mapping[str, Mapping[str, str]], a: str, b: str, where: str) -> None:
    """Raise AdapterError listing every module with one factor but not the other."""
    alone = [roles[a] for roles in groups.values() if a in roles and b not in roles]
    alone += [roles[b] for roles in groups.values() if b in roles and a not in roles]
    if alone:
        count = f"{len(alone)} tensor{'s lack their' if len(alone) > 1 else ' lacks its'}"
        raise AdapterError(f"{where}: {count} other half: {listed(alone, 4)}.", INCOMPLETE)


def check_owners(groups: Mapping[str, Mapping[str, str]], a: str, where: str) -> None:
    """Raise AdapterError listing every alpha, gate or the like whose module has no pair."""
    alone = [key for roles in groups.values() if a not in roles for key in roles.values()]
    if alone:
        raise AdapterError(f"{where}: these belong to no pair: {listed(alone, 4)}.", INCOMPLETE)


def kind_of(name: str) -> Kind:
    """The kind of a layer by its name, where a file does not tell it."""
    return "embedding" if name.rpartition(".")[2] in EMBEDDINGS else "linear"


def pair(name: str, keys: Mapping[str, str], A: TensorInfo, B: TensorInfo, kind: Kind) -> Module:
    """The module that A [r, in, *kernel] and B [out, r, 1...] describe, with scaling 1.

    A `linear` whose A has a kernel is a `conv`. Raises AdapterError for shapes that do not
    multiply, and for dtypes that are no plain floats.
    """
    for key, info in ((keys["A"], A), (keys["B"], B)):
        if info.dtype not in FLOATS:
            raise AdapterError(
                f"{key} is stored as {info.dtype}; low-rank factors must be F64, F32, F16 or BF16.",
                QUANTISED,
            )
        if len(info.shape) < 2:
            raise AdapterError(
                f"{key} has the shape {list(info.shape)}: flat factors are what DeepSpeed ZeRO-3 "
                "and FSDP save before gathering.",
                "gather the weights before saving: zero_to_fp32.py, or FSDP's full state dict",
            )
    rank, channels, *kernel = A.shape
    fits = B.shape[1:] in ((rank,), (rank, *(1 for _ in kernel)))
    if not fits or (kind == "embedding" and kernel):
        raise AdapterError(
            f"{keys['A']} {list(A.shape)} and {keys['B']} {list(B.shape)} do not multiply.",
            INCOMPLETE,
        )
    if rank > MAX_RANK:
        raise AdapterError(f"{keys['A']} has rank {rank:,}; the limit is {MAX_RANK:,}.", INCOMPLETE)
    return Module(
        name=name,
        kind="conv" if kernel else kind,
        out_features=B.shape[0],
        in_features=channels * math.prod(kernel),
        rank=rank,
        scaling=1.0,
        dtype=A.dtype if A.dtype == B.dtype else "F32",
        keys=keys,
        kernel=tuple(kernel),
    )


def scaled(
    source: Source, groups: Mapping[str, Mapping[str, str]], where: str
) -> tuple[dict[str, Module], int]:
    """The pairs A and B of a file with their scale alpha / rank, and how many have no alpha.

    The rank is that of the tensor; no alpha, or 0, means scale 1. Raises AdapterError for what is
    no pair.
    """
    check_pairs(groups, "A", "B", where)
    check_owners(groups, "A", where)
    modules: dict[str, Module] = {}
    silent = 0
    for name, roles in groups.items():
        A, B = source.tensors[roles["A"]], source.tensors[roles["B"]]
        module, alpha = pair(name, roles, A, B, "linear"), alpha_of(source, roles)
        modules[name] = replace(module, scaling=alpha / module.rank) if alpha else module
        silent += not alpha
    return modules, silent


def factor_shapes(module: Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How A and B of a module are stored: the inverse of `pair`."""
    channels = module.in_features // math.prod(module.kernel)
    A = (module.rank, channels, *module.kernel)
    return A, (module.out_features, module.rank, *(1 for _ in module.kernel))
