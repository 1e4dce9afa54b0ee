"""kohya sd-scripts: one file, <lora_name>.lora_down.weight, .lora_up.weight and .alpha."""

import hashlib
import re

from msgspec.structs import replace

from loramerge.adapter import Adapter
from loramerge.io._grammar import Grammar, scaled
from loramerge.io._layout import Draft, Given, Layout, Written, alpha_of
from loramerge.io._pipeline import agreed, alphas, carried, described, own_scale, pairs
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
# Stand for the hashes of a file that is not written yet.
UNSEALED = {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8}
# The bytes of a file that its legacy hash is of.
LEGACY = slice(0x100000, 0x110000)


def explains(key: str) -> bool:
    """Keys of a lora_name with kohya's roles."""
    return GRAMMAR.parse(key) is not None


def read(given: Given) -> Adapter:
    """Describe a kohya file. Scale alpha / rank of the tensor; no alpha, or 0, means scale 1."""
    own_scale(given)
    groups = GRAMMAR.group(given.source.tensors)
    modules, silent = scaled(given.source, groups, given.reference)
    return described(given, "kohya", modules, groups, silent=silent)


def write(draft: Draft) -> Written:
    """Pairs with the alpha of each module: the largest rank in a merge, as diffusers reads one.

    What a LyCORIS file holds beside them, differences of biases and norms, stays LyCORIS's.
    """
    tensors = (
        *pairs(draft, "lora_down.weight", "lora_up.weight"),
        *alphas(draft.modules),
        *carried(draft),
    )
    one = len({alpha_of(module) for module in draft.modules}) < 2
    network = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(draft.rank) if draft.uniform else "Dynamic",
        "ss_network_alpha": str(draft.alpha) if one else "Dynamic",
    }
    metadata = {"format": "pt", **agreed(draft), **network, **UNSEALED}
    return Written(tensors, metadata, seal=hashes)


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
    scale="alphas",
)
