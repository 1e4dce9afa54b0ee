"""kohya sd-scripts: one file, <lora_name>.lora_down.weight, .lora_up.weight and .alpha."""

import re
import struct
from typing import cast

from loramerge.adapter import Adapter, Module, Variant
from loramerge.errors import AdapterError, UsageError
from loramerge.io._grammar import Grammar, check_pairs, pair_shape
from loramerge.io._layout import Draft, Given, Layout, Stored, Written
from loramerge.io._source import Source

NAME = r"(?P<module>(?:lora|lycoris)_[^.]+)"
GRAMMAR = Grammar(
    (
        ("A", re.compile(NAME + r"\.lora_down\.weight")),
        ("B", re.compile(NAME + r"\.lora_up\.weight")),
        ("alpha", re.compile(NAME + r"\.alpha")),
        ("dora_scale", re.compile(NAME + r"\.dora_scale")),
    )
)
DORA = Variant(
    "DoRA (dora_scale)",
    "its magnitudes act on the sum of base weight and update, which needs the base model",
    "merge it into its base model with the tool that trained it",
)
# Metadata that stays true of a result where all sources agree on it. The rest describes one
# training run, or holds hashes and paths that would be stale or private.
KEPT = (
    "modelspec.architecture",
    "modelspec.implementation",
    "modelspec.prediction_type",
    "modelspec.resolution",
    "modelspec.sai_model_spec",
    "ss_base_model_version",
    "ss_v2",
)


def explains(key: str) -> bool:
    """Keys of a lora_name with kohya's roles."""
    return GRAMMAR.parse(key) is not None


def read(given: Given) -> Adapter:
    """Describe a kohya file. Scale alpha / rank of the tensor; no alpha, or 0, means scale 1."""
    if given.alpha is not None:
        raise UsageError(
            f"{given.reference} holds an alpha for each module; --alpha is for bare PEFT files.",
            "leave --alpha out",
        )
    source = cast(Source, given.source)
    groups = GRAMMAR.group(source.tensors)
    check_pairs(groups, "A", "B", given.reference)
    modules: dict[str, Module] = {}
    for name, roles in groups.items():
        if "A" not in roles:
            raise AdapterError(
                f"{given.reference}: {next(iter(roles.values()))} belongs to no pair."
            )
        A, B = source.tensors[roles["A"]], source.tensors[roles["B"]]
        pair = pair_shape(roles["A"], A, B)
        alpha = source.scalar(roles["alpha"]) if "alpha" in roles else 0.0
        modules[name] = Module(
            name=name,
            kind=pair.kind,
            out_features=pair.out_features,
            in_features=pair.in_features,
            rank=pair.rank,
            scaling=alpha / pair.rank if alpha else 1.0,
            dtype=A.dtype if A.dtype == B.dtype else "F32",
            keys=roles,
            kernel=pair.kernel,
        )
    missing = sum("alpha" not in roles for roles in groups.values())
    return Adapter(
        reference=given.reference,
        layout="kohya",
        modules=modules,
        source=source,
        variants=(DORA,) if any("dora_scale" in roles for roles in groups.values()) else (),
        metadata=given.metadata,
        base_model=given.metadata.get("ss_base_model_version"),
        assumed=(f"scale 1 for {missing} modules without .alpha, as kohya does",)
        if missing
        else (),
    )


def write(draft: Draft) -> Written:
    """Pairs with one alpha for all modules, the largest rank: diffusers reads only one."""
    tensors: list[Stored] = []
    for module in draft.modules:
        channels = module.in_features
        for size in module.kernel:
            channels //= size
        A_shape = (module.rank, channels, *module.kernel)
        B_shape = (module.out_features, module.rank, *(1,) * len(module.kernel))
        alpha = struct.pack("<f", draft.rank)
        tensors += [
            Stored(f"{module.name}.lora_down.weight", module.dtype, A_shape, module.name, "A"),
            Stored(f"{module.name}.lora_up.weight", module.dtype, B_shape, module.name, "B"),
            Stored(f"{module.name}.alpha", "F32", (), constant=alpha),
        ]
    kept = {
        key: value
        for key in KEPT
        if len({source.metadata.get(key) for source in draft.sources}) == 1
        and (value := draft.sources[0].metadata.get(key)) is not None
    }
    network = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(draft.rank) if draft.uniform else "Dynamic",
        "ss_network_alpha": str(draft.rank),
    }
    return Written(tensors=tuple(tensors), metadata={"format": "pt", **kept, **network})


LAYOUT = Layout(
    name="kohya",
    summary="kohya sd-scripts, A1111 and ComfyUI: one file, alpha and rank per module.",
    directory=False,
    explains=explains,
    read=read,
    write=write,
)
