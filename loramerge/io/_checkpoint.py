"""A model's own weights: one safetensors file, shards with an index, or a pipeline of models."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from msgspec import Struct, field
from msgspec.structs import replace

from loramerge.adapter import Array, TensorInfo
from loramerge.errors import AdapterError, listed
from loramerge.io._source import FLOATS, Source, open_source

__all__ = ["Checkpoint", "open_checkpoint"]

SINGLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")
INDEX = ("model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json")
MAX_INDEX = 50_000_000
WEIGHT = ".weight"
# What quantisers store beside or instead of a weight.
QUANTISED = (
    *(".qweight", ".qzeros", ".scales", ".absmax", ".quant_map", ".weight_scale"),
    *(".weight_scale_inv", ".SCB", ".weight_format"),
)
# What wrappers and pipelines put before the names of a model, in checkpoints or in adapters.
PREFIXES = (
    *("", "model.", "transformer.", "base_model.", "language_model."),
    *("unet.", "text_encoder.", "text_encoder_2.", "diffusion_model.", "model.diffusion_model."),
    *("text_model.", "text_encoder.text_model.", "text_encoder_2.text_model."),
)
# Names in kohya's files: of a component, then its path with underscores for dots.
FLAT = re.compile(r"(?:lora_(unet|te\d?|transformer|prior_unet|prior_te)|lycoris)_(.+)")
# A diffusers pipeline: a folder for each model. Those that kohya's components may be, in order.
PIPELINE = "model_index.json"
FOLDERS = {
    **{"unet": ("unet", "transformer"), "transformer": ("transformer",), "prior_unet": ("prior",)},
    **{"te": ("text_encoder",), "te1": ("text_encoder",), "te2": ("text_encoder_2",)},
    **{"te3": ("text_encoder_3", "text_encoder_2"), "prior_te": ("text_encoder",)},
}


class Checkpoint(Struct, frozen=True):
    """An open model: which shard holds which tensor. A TensorSource over all of them.

    `flat` are the keys of weights by their names as kohya writes them; "" where two have one name.
    `parts` are the models of a pipeline by folder, which its own keys begin with.
    """

    path: Path
    shards: tuple[Source, ...]
    holders: Mapping[str, Source]
    flat: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, "Checkpoint"] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(shard.size for shard in self.shards)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by key."""
        return {key: shard.tensors[key] for key, shard in self.holders.items()}

    def read(self, key: str) -> bytes:
        """The stored bytes of one tensor."""
        return self.holders[key].read(key)

    def array(self, key: str) -> Array:
        """One tensor as a float32 array, in its stored shape."""
        return self.holders[key].array(key)

    def chunks(self) -> Iterator[bytes]:
        """All files one after the other, for hashing."""
        for shard in self.shards:
            yield from shard.chunks()

    def weight(self, module: str) -> str | None:
        """The key of a module's weight, whatever wrapper names differ by; None without one."""
        if self.parts:
            return self._weight_of_part(module)
        for prefix in PREFIXES:
            for name in (prefix + module, module.removeprefix(prefix)):
                for key in (name + WEIGHT, name):
                    if key in self.holders:
                        return key
        if flat := FLAT.fullmatch(module):
            path, prefixes = flat[2], map(_flat, PREFIXES)
            names = [name for p in prefixes for name in (p + path, path.removeprefix(p))]
            return next((self.flat[name] for name in names if self.flat.get(name)), None)
        return None

    def _weight_of_part(self, module: str) -> str | None:
        """The same in a pipeline: in the model that the name says, else in the only one with it."""
        flat, (first, _, rest) = FLAT.fullmatch(module), module.partition(".")
        folders, own = tuple(self.parts), module
        if flat and flat[1]:
            folders = FOLDERS[flat[1]]
        elif first in self.parts:
            folders, own = (first,), rest
        found = [
            f"{folder}.{key}"
            for folder in folders
            if folder in self.parts and (key := self.parts[folder].weight(own))
        ]
        return found[0] if len(found) == 1 else None


def open_checkpoint(reference: str) -> Checkpoint:
    """Open a directory of a model or a pipeline, an index, or one file; only headers are read.

    Raises AdapterError for what is no checkpoint, for shards outside its directory, and for
    quantised weights, which hold no numbers a delta weight could be added to.
    """
    path = Path(reference).expanduser()
    directory = path if path.is_dir() else path.parent
    if (path / PIPELINE).is_file():
        return _pipeline(path, reference)
    files = _files(path, reference)
    shards = tuple(open_source(file) for file in files)
    holders: dict[str, Source] = {}
    for shard in shards:
        if twice := sorted(holders.keys() & shard.tensors.keys()):
            raise AdapterError(f"{reference} holds {listed(twice, 3)} twice.", "download it again")
        holders |= dict.fromkeys(shard.tensors, shard)
    if packed := [
        key
        for key, shard in holders.items()
        if key.endswith(QUANTISED)
        or (key.endswith(".weight") and shard.tensors[key].dtype not in FLOATS)
    ]:
        raise AdapterError(
            f"{reference} is quantised ({listed(packed, 2)}): its weights are codes, to which no "
            "update can be added.",
            "name the full-precision model that it was made from",
        )
    flat: dict[str, str] = {}
    for key in holders:
        if key.endswith(WEIGHT):
            name = _flat(key.removesuffix(WEIGHT))
            flat[name] = "" if name in flat else key
    return Checkpoint(directory, shards, holders, flat)


def _pipeline(path: Path, reference: str) -> Checkpoint:
    """Every model of a pipeline that is there as safetensors."""
    folders = sorted({file.parent for name in (*SINGLE, *INDEX) for file in path.glob(f"*/{name}")})
    if not folders:
        raise AdapterError(
            f"{reference} is a pipeline without safetensors weights in its folders.",
            f"its folders must hold {SINGLE[1]}, {SINGLE[0]}",
        )
    parts = {folder.name: open_checkpoint(str(folder)) for folder in folders}
    shards = tuple(
        replace(shard, tensors={f"{name}.{key}": info for key, info in shard.tensors.items()})
        for name, part in parts.items()
        for shard in part.shards
    )
    holders = {key: shard for shard in shards for key in shard.tensors}
    return Checkpoint(path, shards, holders, parts=parts)


def _flat(path: str) -> str:
    return path.replace(".", "_")


def _files(path: Path, reference: str) -> list[Path]:
    """The weights files of a model."""
    if path.is_file() and path.suffix == ".safetensors":
        return [path]
    names = [path] if path.is_file() else [path / name for name in INDEX]
    index = next((file for file in names if file.is_file()), None)
    single = next((path / name for name in SINGLE if (path / name).is_file()), None)
    if index is None and single is not None:
        return [single]
    if index is None:
        raise AdapterError(
            f"{reference} holds no model: no {SINGLE[0]} and no {INDEX[0]}.",
            "name the directory that holds config.json and the weights",
        )
    try:
        text = index.read_bytes() if index.stat().st_size <= MAX_INDEX else b""
        shards = sorted(set(json.loads(text)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise AdapterError(f"{index} is no index of shards.", "download it again") from None
    home = index.parent.resolve()
    outside = [name for name in shards if (home / str(name)).resolve().parent != home]
    if outside:
        raise AdapterError(
            f"{index} names files outside its directory: {listed(outside, 3)}.", "download it again"
        )
    missing = [name for name in shards if not (home / name).is_file()]
    if missing:
        raise AdapterError(f"{reference} lacks its shards {listed(missing, 3)}.", "download them")
    return [index.parent / name for name in shards]
