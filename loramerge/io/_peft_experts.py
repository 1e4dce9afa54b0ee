"""PEFT's target_parameters: one pair of factors for all experts of a layer, wrapped in nests."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from loramerge._lazy import np
from loramerge.adapter import Array, LowRank, Module, TensorSource
from loramerge.errors import AdapterError, IncompatibleError, listed
from loramerge.io._grammar import INCOMPLETE
from loramerge.io._layout import Draft, Stored
from loramerge.io._peft_keys import PREFIX

__all__ = ["experts", "stacked", "targets"]

FIELD = "target_parameters"
# The parameters of a layer of experts in the order in which transformers defines them. PEFT wraps
# them in this order, whatever the order of its config, and a key does not name its parameter.
DEFINED = ("gate_up_proj", "down_proj")
NEST = ".base_layer"
NUMBERED = re.compile(r"(?P<path>.+)\.(?P<expert>\d+)\.(?P<parameter>[^.]+)")


def experts(
    config: Mapping[str, Any], plain: Mapping[str, Module], where: str
) -> dict[str, Module]:
    """The modules of a file, with one for each expert where a pair holds several.

    A [E r, in] holds expert after expert, B [out, E r] rank after rank. A module of parameter p of
    expert e at path P is called P.e.p; where only the base model knows which parameter is which,
    p is its place among those wrapped there. Raises AdapterError for factors that cannot be split.
    """
    targets = config.get(FIELD) or []
    rank = config.get("r")
    nested = [name for name in plain if name.endswith(NEST)]
    if nested and not targets:
        raise AdapterError(
            f"{where}: {listed(nested, 3)} hold parameters of experts, which only "
            f"{FIELD} in adapter_config.json names.",
            "name the directory with its adapter_config.json",
        )
    found: dict[str, Module] = {}
    for name, module in plain.items():
        path = name.removesuffix(NEST) if name not in nested else name.split(NEST)[0]
        parameters = _wrapped(path, targets)
        if not parameters:
            found[name] = module
            continue
        nests = name.count(NEST)
        if not isinstance(rank, int) or rank < 1 or module.rank % rank or nests >= len(parameters):
            raise AdapterError(
                f"{where}: {name} has {module.rank} ranks at nest {nests}; its config says r "
                f"{rank} and {FIELD} {listed(list(targets))}.",
                INCOMPLETE,
            )
        count = module.rank // rank
        parameter = parameters[len(parameters) - 1 - nests]
        for expert in range(count):
            own = f"{path}.{expert}.{parameter}"
            found[own] = replace(
                module, name=own, kind="parameter", rank=rank, form=_Expert(expert, count)
            )
    return found


def _wrapped(path: str, targets: Iterable[str]) -> list[str]:
    """The parameters of a module that a config names, in the order of their nests."""
    found = {
        parameter
        for holder, _, parameter in (target.rpartition(".") for target in targets)
        if not holder or f".{path}".endswith(f".{holder}")
    }
    if found <= set(DEFINED):
        return [parameter for parameter in DEFINED if parameter in found]
    if len(found) == 1:
        return list(found)
    return [f"parameter_{place}_of_{len(found)}" for place in range(1, len(found) + 1)]


class _Expert(Struct, frozen=True):
    """A form: one expert of A [E r, in] and B [out, E r]."""

    number: int
    count: int

    def __call__(self, source: TensorSource, module: Module) -> LowRank:
        A, B = (source.array(module.keys[part]) for part in ("A", "B"))
        A = A.reshape(self.count, module.rank, module.in_features)
        B = B.reshape(module.out_features, module.rank, self.count)
        return LowRank(A=A[self.number], B=np.ascontiguousarray(B[..., self.number]))


def targets(draft: Draft) -> list[str]:
    """What target_parameters of a result must name: what its sources do, as far as it is there.

    Parameters that none of them names, having had modules in their place, are named in full.
    """
    matches = [NUMBERED.fullmatch(m.name) for m in draft.modules if m.kind == "parameter"]
    here = {(match["path"], match["parameter"]) for match in matches if match}
    named = dict.fromkeys(t for s in draft.sources for t in s.config.get(FIELD) or [])
    kept = [
        target
        for target in named
        if any(
            parameter in _wrapped(path, [target]) or parameter not in DEFINED
            for path, parameter in here
        )
    ]
    new = [
        f"{path}.{parameter}"
        for path, parameter in sorted(here)
        if parameter in DEFINED and parameter not in _wrapped(path, kept)
    ]
    return kept + new


def stacked(draft: Draft) -> list[Stored]:
    """The tensors of every layer of experts among the modules.

    Raises IncompatibleError where an expert that a source has is missing or has another rank.
    """
    tensors: list[Stored] = []
    sources = [_layers(source.modules.values()) for source in draft.sources]
    for path, parameters in _layers(draft.modules).items():
        order = sorted(parameters, key=lambda p: DEFINED.index(p) if p in DEFINED else p)
        for place, parameter in enumerate(order):
            nests = NEST * (len(order) - 1 - place)
            there = set().union(*(one.get(path, {}).get(parameter, ()) for one in sources))
            tensors += _joined(f"{PREFIX}{path}{nests}", parameters[parameter], there)
    return tensors


def _layers(modules: Iterable[Module]) -> dict[str, dict[str, dict[int, Module]]]:
    """Every expert by its layer, its parameter and its number."""
    layers: dict[str, dict[str, dict[int, Module]]] = {}
    for module in modules:
        match = NUMBERED.fullmatch(module.name) if module.kind == "parameter" else None
        if match:
            parameters = layers.setdefault(match["path"], {})
            parameters.setdefault(match["parameter"], {})[int(match["expert"])] = module
    return layers


def _joined(stem: str, members: Mapping[int, Module], there: Collection[int]) -> list[Stored]:
    if lacking := {*range(len(members)), *there} - members.keys():
        raise IncompatibleError(
            f"{stem.removeprefix(PREFIX)}: PEFT holds all experts of a layer; numbers "
            f"{listed([str(number) for number in sorted(lacking)])} would be missing.",
            "keep them all, or leave out the whole layer with --exclude",
        )
    ranks = {module.rank for module in members.values()}
    if len(ranks) > 1:
        raise IncompatibleError(
            f"{stem.removeprefix(PREFIX)}: PEFT holds all experts of a layer at one rank; these "
            f"have {listed([str(rank) for rank in sorted(ranks)])}.",
            "leave out --layout pattern",
        )
    first, count = members[0], len(members)
    whose = tuple(members[number].name for number in range(count))
    A, B = (count * first.rank, first.in_features), (first.out_features, count * first.rank)
    return [
        Stored(f"{stem}.lora_A.weight", first.dtype, A, whose, "A", expert_after_expert),
        Stored(f"{stem}.lora_B.weight", first.dtype, B, whose, "B", rank_after_rank),
    ]


def expert_after_expert(factors: Sequence[Array]) -> Array:
    """A of all experts: [E r, in]."""
    return np.concatenate(factors)


def rank_after_rank(factors: Sequence[Array]) -> Array:
    """B of all experts, with the experts of one rank beside each other: [out, r, E]."""
    return np.stack(factors, axis=-1)
