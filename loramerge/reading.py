"""What a method sees of a batch of modules, straight from the files."""

import zlib
from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from loramerge._lazy import np
from loramerge.adapter import Adapter, Array, LowRank, Module, Role, Updates
from loramerge.align import Aligned
from loramerge.compute import Compute, finite, flaw
from loramerge.errors import IncompatibleError
from loramerge.plan import Plan
from loramerge.siblings import readers, role

__all__ = [
    "key_of",
    "place_of",
    "read_finite",
    "read_updates",
    "readers_beside",
    "role_of",
    "seen_by",
]


def read_updates(
    plan: Plan, compute: Compute, batch: Sequence[Aligned], shared: dict[Any, Any] | None = None
) -> Updates:
    """The updates of a batch, with what is known of each and what the method asks for beside.

    What was read for modules beside it is in `shared`.
    """
    shared = {} if shared is None else shared

    def load(position: int, row: Sequence[Module | None]) -> LowRank:
        key = (position, *(one and one.name for one in row))
        if key not in shared:
            names = [one.name for one in row if one is not None]
            if len(names) == len(row):
                shared[key] = _loaded(plan, compute, position, names)
            else:
                shared[key] = LowRank(factors[-1].A[..., :0, :], factors[-1].B[..., :0])
        found: LowRank = shared[key]
        return found

    settings = plan.recipe.settings
    factors, weights, scalings, keys, gates, beside = [], [], [], [], [], []
    for position, member in enumerate(batch[0].members):
        if member is None:
            continue
        modules = plan.adapters[position].modules
        factors.append(load(position, [modules[module.name] for module in batch]))
        if plan.recipe.method.siblings:
            rows = zip(*(readers_beside(plan, module, position) for module in batch), strict=True)
            beside.append(tuple(load(position, row) for row in rows))
        weights.append(batch[0].weights[position])
        scalings.append(member.scaling)
        gates.append(_gates(plan, position, batch, compute) if member.gates else None)
        keys.append(tuple(key_of(settings.seed, position, module.name) for module in batch))
    return Updates(
        factors=tuple(factors),
        weights=tuple(weights),
        scalings=tuple(scalings),
        rank=_rank(plan, batch),
        seed=settings.seed,
        keys=tuple(keys),
        gates=tuple(gates),
        present=tuple(member is not None for member in batch[0].members),
        names=tuple(module.name for module in batch),
        siblings=tuple(beside),
        role=role_of(plan, batch[0]),
        place=place_of(plan, batch[0]),
        shared=shared,
    )


def seen_by(plan: Plan, updates: Updates, batch: Sequence[Aligned]) -> Updates:
    """A batch that was read for another plan of the same modules, as this one sees it."""
    return replace(updates, rank=_rank(plan, batch))


def _rank(plan: Plan, batch: Sequence[Aligned]) -> int | None:
    """The rank a result is to have, where it is known from the headers."""
    return None if plan.recipe.criterion else plan.ranks[batch[0].name]


def _loaded(plan: Plan, compute: Compute, position: int, names: Sequence[str]) -> LowRank:
    """The updates of these modules of one adapter, as a batch on the device."""
    read = [read_finite(plan.adapters[position], name) for name in names]
    return LowRank(compute.load([u.A for u in read]), compute.load([u.B for u in read]))


def readers_beside(plan: Plan, module: Aligned, position: int) -> list[Module | None]:
    """An adapter's other modules that read the same input, where the method looks at them.

    None for one that another adapter has, and for one that takes inputs of another form.
    """
    if not plan.recipe.method.siblings or module.members[position] is None:
        return []
    modules = plan.adapters[position].modules
    found = [modules.get(name) for name in _family(plan, module) if name != module.name]
    width = module.model.shape[1]
    return [one if one and (one.kind, one.shape[1]) == ("linear", width) else None for one in found]


def place_of(plan: Plan, module: Aligned) -> int:
    """How many of the modules that read the same input come before it."""
    return _family(plan, module).index(module.name)


def _family(plan: Plan, module: Aligned) -> tuple[str, ...]:
    """The modules of any adapter that read what this one reads."""
    return readers(module.name, lambda name: any(name in one.modules for one in plan.adapters))


def role_of(plan: Plan, module: Aligned) -> Role:
    """What a module does, where the method looks at siblings."""
    return role(module.name) if plan.recipe.method.siblings else "other"


def _gates(plan: Plan, position: int, batch: Sequence[Aligned], compute: Compute) -> Array:
    """The magnitudes of the open gates of one adapter. [b, r]"""
    members = [plan.adapters[position].modules[module.name] for module in batch]
    rows = [np.asarray([abs(gate) for gate in m.gates if gate], np.float64) for m in members]
    return compute.load(rows)


def key_of(seed: int, position: int, name: str) -> int:
    """A 32-bit number that names one module of one adapter under one seed."""
    return zlib.crc32(f"{seed}/{position}/{name}".encode())


def read_finite(adapter: Adapter, name: str) -> LowRank:
    """The update of one module. Raises IncompatibleError where it holds NaN or Inf."""
    update = adapter.read(name)
    if not finite(update):
        raise IncompatibleError(
            f"{adapter.reference}: {name} holds {flaw(update)}.",
            "the training diverged, or the file is damaged; use an earlier checkpoint",
        )
    return update
