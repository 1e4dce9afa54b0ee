"""MLX (mlx-lm): lora_a [in, r] and lora_b [r, out] beside a config with a multiplier."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from msgspec.structs import replace

from loramerge._lazy import np
from loramerge.adapter import (
    Adapter,
    Array,
    LowRank,
    Module,
    TensorSource,
    public_base,
)
from loramerge.errors import AdapterError, IncompatibleError, UsageError, listed
from loramerge.io._grammar import (
    INCOMPLETE,
    Grammar,
    check_owners,
    check_pairs,
    dora,
    kind_of,
    pair,
)
from loramerge.io._layout import Draft, Given, Layout, Stored, Written

NAME = r"(?P<module>.+)"
GRAMMAR = Grammar(
    (
        ("A", re.compile(NAME + r"\.lora_a")),
        ("B", re.compile(NAME + r"\.lora_b")),
        ("magnitude", re.compile(NAME + r"\.m")),
    )
)
# What mlx-lm calls a layer of experts; transformers numbers them in `experts`.
SWITCH, EXPERTS = (
    ".switch_mlp.",
    re.compile(r"(?P<layer>.+)\.experts\.(?P<expert>\d+)\.(?P<leaf>.+)"),
)
DEFAULT_SCALE = 20.0  # mlx-lm's, where a config leaves it out
EVERY_LAYER = -1


def explains(key: str) -> bool:
    """Factors in lower case without `.weight`, and DoRA's magnitudes."""
    return GRAMMAR.parse(key) is not None


def read(given: Given) -> Adapter:
    """Describe an MLX file: dW = scale * lora_b^T lora_a^T, scale being no alpha / r.

    The `alpha` that some configs hold is ignored, as mlx-lm does. lora_a [E, r, in] of a layer of
    experts becomes a module for each.
    """
    source, where = given.source, given.reference
    groups = GRAMMAR.group(source.tensors)
    check_pairs(groups, "A", "B", where)
    check_owners(groups, "A", where)
    about = given.config is not None and "peft_type" not in given.config
    config = given.config if about and given.config else {}
    scale, notes = _scale(where, config if about else None, given.alpha)
    modules: dict[str, Module] = {}
    for name, roles in groups.items():
        for module in _modules(source, name, roles):
            modules[module.name] = replace(module, scaling=scale)
    base = config.get("model")
    return Adapter(
        reference=where,
        layout="mlx",
        modules=modules,
        source=source,
        variants=dora(groups, "magnitude"),
        config=config,
        metadata=source.metadata,
        base_model=base if isinstance(base, str) else None,
        assumed=tuple(notes),
        scale_assumed=not about and given.alpha is None,
    )


def _scale(
    where: str, config: Mapping[str, Any] | None, alpha: float | None
) -> tuple[float, list[str]]:
    """The multiplier on B @ A, and what had to be assumed."""
    if config is None:
        if alpha is not None:
            return alpha, [f"scale {alpha:g}: --alpha is taken as MLX's multiplier"]
        return 1.0, ["scale 1: the file does not say it (--alpha N sets MLX's multiplier)"]
    if alpha is not None:
        raise UsageError(f"{where} has its scale in adapter_config.json.", "leave --alpha out")
    stated = config.get("lora_parameters", {})
    scale = stated.get("scale", DEFAULT_SCALE) if isinstance(stated, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise AdapterError(
            f"adapter_config.json: lora_parameters.scale is {scale!r}, not a number.",
            "correct adapter_config.json",
        )
    ignored = [key for key in ("alpha", "lora_alpha") if key in stated]
    notes = [f"{key} in lora_parameters is ignored, as by mlx-lm: scale counts" for key in ignored]
    if "scale" not in stated:
        notes.append(f"scale {DEFAULT_SCALE:g}, mlx-lm's default: its config does not say")
    return float(scale), notes


def _modules(source: TensorSource, name: str, roles: Mapping[str, str]) -> list[Module]:
    A, B = source.tensors[roles["A"]], source.tensors[roles["B"]]
    keys = {part: roles[part] for part in ("A", "B", "magnitude") if part in roles}
    if len(A.shape) == 3:
        experts = A.shape[0]
        if B.shape[:1] != A.shape[:1] or SWITCH not in name:
            raise AdapterError(
                f"{roles['A']} {list(A.shape)} and {roles['B']} {list(B.shape)} are no experts.",
                INCOMPLETE,
            )
        A, B = (replace(info, shape=info.shape[1:]) for info in (A, B))
        return [
            replace(
                pair(_expert(name, expert), keys, A, B, "linear"), form=partial(_switched, expert)
            )
            for expert in range(experts)
        ]
    A, B = (replace(info, shape=info.shape[::-1]) for info in (A, B))
    return [replace(pair(name, keys, A, B, kind_of(name)), form=_turned)]


def _expert(name: str, expert: int) -> str:
    return name.replace(SWITCH, f".experts.{expert}.")


def _turned(source: TensorSource, module: Module) -> LowRank:
    """lora_a [in, r] and lora_b [r, out], transposed."""
    return LowRank(*(np.ascontiguousarray(source.array(module.keys[p]).T) for p in ("A", "B")))


def _switched(expert: int, source: TensorSource, module: Module) -> LowRank:
    """One expert of lora_a [E, r, in] and lora_b [E, out, r]."""
    return LowRank(*(source.array(module.keys[p])[expert] for p in ("A", "B")))


def turn(factors: Sequence[Array]) -> Array:
    """A factor as MLX stores that of a plain layer."""
    return factors[0].T


def write(draft: Draft) -> Written:
    """Transposed factors with one rank and one scale, that of a merge being 1.

    Experts of one layer are in one tensor. Raises IncompatibleError for convolutions, which mlx-lm
    does not adapt.
    """
    if kernels := [module.name for module in draft.modules if module.kernel]:
        raise IncompatibleError(
            f"MLX has no LoRA of convolutions: {listed(kernels, 4)}.",
            "leave them out with --exclude, or keep the layout",
        )
    tensors: list[Stored] = []
    switched: dict[str, dict[int, Module]] = {}
    for module in draft.modules:
        if match := EXPERTS.fullmatch(module.name):
            name = f"{match['layer']}{SWITCH}{match['leaf']}"
            switched.setdefault(name, {})[int(match["expert"])] = module
            continue
        m, n, r = module.out_features, module.in_features, module.rank
        whose = (module.name,)
        tensors.append(Stored(f"{module.name}.lora_a", module.dtype, (n, r), whose, "A", turn))
        tensors.append(Stored(f"{module.name}.lora_b", module.dtype, (r, m), whose, "B", turn))
    for name, experts in switched.items():
        tensors += _stacked(name, experts)
    text = json.dumps(_config(draft), indent=4, sort_keys=True) + "\n"
    return Written(tensors=tuple(tensors), companions={"adapter_config.json": text.encode()})


def _stacked(name: str, experts: Mapping[int, Module]) -> list[Stored]:
    """The two tensors of a layer of experts. Raises IncompatibleError where one is missing."""
    if missing := set(range(max(experts) + 1)) - experts.keys():
        raise IncompatibleError(
            f"{name}: MLX holds all experts of a layer or none; number {min(missing)} is missing.",
            f"leave out the layer: --exclude '{name.replace(SWITCH, '.experts.*.')}'",
        )
    whose = tuple(experts[number].name for number in sorted(experts))
    first, count = experts[0], len(experts)
    m, n, r = first.out_features, first.in_features, first.rank
    return [
        Stored(f"{name}.lora_a", first.dtype, (count, r, n), whose, "A", stack),
        Stored(f"{name}.lora_b", first.dtype, (count, m, r), whose, "B", stack),
    ]


def stack(factors: Sequence[Array]) -> Array:
    """The factors of all experts, one after the other."""
    return np.stack(factors)


def _config(draft: Draft) -> dict[str, Any]:
    """What mlx-lm needs to wrap the layers and to scale them."""
    names = [module.name for module in draft.modules]
    layers = re.compile(r"(?:.+\.)?layers\.\d+\.(?P<path>.+)")
    paths = [match["path"] if (match := layers.fullmatch(name)) else name for name in names]
    keys = sorted({re.sub(r"\.experts\.\d+\.", SWITCH, f".{path}")[1:] for path in paths})
    known = [source.config for source in draft.sources if source.layout == "mlx"]
    counts = {config.get("num_layers", config.get("lora_layers")) for config in known}
    same = len(known) == len(draft.sources) and len(counts) == 1
    count = next(iter(counts)) if same else EVERY_LAYER
    bases = {public_base(source) for source in draft.sources}
    base = next(iter(bases)) if len(bases) == 1 else None
    scale = float(draft.modules[0].scaling)
    return {
        "fine_tune_type": "lora",
        "lora_parameters": {"dropout": 0.0, "keys": keys, "rank": draft.rank, "scale": scale},
        "num_layers": count if isinstance(count, int) else EVERY_LAYER,
        **({"model": base} if base else {}),
    }


LAYOUT = Layout(
    name="mlx",
    summary="MLX (mlx-lm): transposed factors, one multiplier, experts stacked.",
    directory=True,
    explains=explains,
    read=read,
    write=write,
    one_rank=True,
    scale="multiplier",
    weights="adapters.safetensors",
)
