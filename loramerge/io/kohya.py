"""kohya sd-scripts: one file, <lora_name>.lora_down.weight, .lora_up.weight and .alpha."""

import hashlib
import re
import struct
from dataclasses import replace

from loramerge.adapter import Adapter, Module, Variant
from loramerge.errors import UsageError
from loramerge.io._grammar import Grammar, alpha_of, check_owners, check_pairs, factor_shapes, pair
from loramerge.io._layout import Draft, Given, Layout, Stored, Written
from loramerge.io._source import Source
from loramerge.io._write import header

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
# Stand for the hashes of a file that is not written yet.
UNSEALED = {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8}
# The bytes of a file that its legacy hash is of.
LEGACY = slice(0x100000, 0x110000)


def explains(key: str) -> bool:
    """Keys of a lora_name with kohya's roles."""
    return GRAMMAR.parse(key) is not None


def read(given: Given) -> Adapter:
    """Describe a kohya file. Scale alpha / rank of the tensor; no alpha, or 0, means scale 1."""
    source, where = given.source, given.reference
    if given.alpha is not None:
        raise UsageError(
            f"{where} holds an alpha for each module; --alpha is for bare PEFT files.",
            "leave --alpha out",
        )
    groups = GRAMMAR.group(source.tensors)
    check_pairs(groups, "A", "B", where)
    check_owners(groups, "A", where)
    modules: dict[str, Module] = {}
    silent = 0
    for name, roles in groups.items():
        A, B = source.tensors[roles["A"]], source.tensors[roles["B"]]
        module = pair(name, roles, A, B, "linear")
        alpha = alpha_of(source, roles)
        modules[name] = replace(module, scaling=alpha / module.rank) if alpha else module
        silent += not alpha
    return Adapter(
        reference=where,
        layout="kohya",
        modules=modules,
        source=source,
        naming="kohya",
        variants=(DORA,) if any("dora_scale" in roles for roles in groups.values()) else (),
        metadata=source.metadata,
        base_model=source.metadata.get("ss_base_model_version"),
        assumed=(
            f"scale 1 where alpha is missing or 0, as in kohya: {silent} of {len(modules)} modules",
        )
        if silent
        else (),
    )


def write(draft: Draft) -> Written:
    """Pairs with one alpha for all modules, the largest rank: diffusers reads only one."""
    tensors: list[Stored] = []
    alpha = struct.pack("<f", draft.rank)
    for module in draft.modules:
        A, B = factor_shapes(module)
        tensors += [
            Stored(f"{module.name}.lora_down.weight", module.dtype, A, (module.name,), "A"),
            Stored(f"{module.name}.lora_up.weight", module.dtype, B, (module.name,), "B"),
            Stored(f"{module.name}.alpha", "F32", (), content=lambda: alpha),
        ]
    first, *others = (source.metadata for source in draft.sources)
    kept = {
        key: first[key]
        for key in KEPT
        if key in first and all(other.get(key) == first[key] for other in others)
    }
    network = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(draft.rank) if draft.uniform else "Dynamic",
        "ss_network_alpha": str(draft.rank),
    }
    metadata = {"format": "pt", **kept, **network, **UNSEALED}
    return Written(tuple(tensors), metadata, seal=hashes)


def hashes(written: Written, source: Source) -> dict[str, str]:
    """The hashes by which kohya's trainer and web interfaces know a file.

    Both are of the file that the safetensors library writes with the metadata of the training
    alone: sshs_model_hash of all that follows the header, sshs_legacy_hash of 64 KiB in it.
    """
    training = {key: text for key, text in written.metadata.items() if key.startswith("ss_")}
    head, _ = header(replace(written, metadata=training))
    model, legacy = hashlib.sha256(), hashlib.sha256(head[LEGACY])
    place = len(head)
    for key in sorted(source.tensors, key=lambda key: source.tensors[key].start):
        data = source.read(key)
        model.update(data)
        legacy.update(data[max(LEGACY.start - place, 0) : max(LEGACY.stop - place, 0)])
        place += len(data)
    return {"sshs_model_hash": model.hexdigest(), "sshs_legacy_hash": legacy.hexdigest()[:8]}


LAYOUT = Layout(
    name="kohya",
    summary="kohya sd-scripts, A1111 and ComfyUI: one file, alpha and rank per module.",
    directory=False,
    explains=explains,
    read=read,
    write=write,
    naming="kohya",
)
