"""The record in a file's header: what it was made from, and how, back to its first sources.

Everything in it is known before a tensor is written but the hashes of the sources, which are put
in at the end: they are of one length. A source that was made by loramerge brings its own record
along, so that the last file of a chain tells the whole of it.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec

from loramerge.adapter import Adapter, TensorInfo, source_name
from loramerge.errors import listed

__all__ = [
    "KEY",
    "UNKNOWN",
    "Canonical",
    "Record",
    "Source",
    "made",
    "source",
    "tensors_sha256",
    "unlicensed",
    "unsaid",
]

# The key in the safetensors metadata.
KEY = "loramerge"
# Metadata that says nothing of an adapter, is carried in the record, or is what torchtune's layout
# reads as its scale and its base.
FORMAL = frozenset(("format", KEY, "lora_alpha", "base_model_name_or_path"))
# Stands for a hash that is not known yet.
UNKNOWN = "0" * 64
# Longer records of sources are not carried: a chain of a hundred steps stays far below.
LONGEST = 200_000


class Canonical(msgspec.Struct, frozen=True):
    """A recipe with every default filled in; what decides the result, and no paths."""

    method: str
    weights: tuple[float, ...]
    alphas: tuple[float | None, ...]
    options: dict[str, Any]
    settings: dict[str, Any]


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """One input: its name without directories, what its files hold, and how it was made.

    `layout` is the one it was read in; `reference` is where on the Hub it is, at which `revision`;
    `config_sha256` covers its adapter_config.json as sorted JSON without spaces. One that follows
    from a base model is `derived`: what was typed for it, without the rank.
    """

    name: str
    sha256: str
    bytes: int
    layout: str | None = None
    config_sha256: str | None = None
    reference: str | None = None
    revision: str | None = None
    made: "Record | None" = None
    derived: tuple[str, ...] = ()


class Record(msgspec.Struct, frozen=True):
    """How a file was made."""

    recipe: Canonical
    sources: tuple[Source, ...]
    version: str

    def text(self) -> str:
        """As one line of canonical JSON."""
        facts = msgspec.to_builtins(self)
        return json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def source(adapter: Adapter, sha256: str = UNKNOWN) -> Source:
    """What is recorded of an input."""
    config = json.dumps(dict(adapter.config), sort_keys=True, separators=(",", ":"))
    return Source(
        name=source_name(adapter),
        sha256=sha256,
        bytes=adapter.source.size,
        layout=adapter.layout,
        config_sha256=_sha256(config) if adapter.config else None,
        reference=adapter.origin.uri if adapter.origin else None,
        revision=adapter.origin.revision if adapter.origin else None,
        made=made(adapter)[0],
        derived=adapter.derived,
    )


def unlicensed(adapters: Sequence[Adapter]) -> list[str]:
    """Why a result states no licence, where some source states one."""
    stated = {adapter.licence or "none" for adapter in adapters}
    if len(stated) == 1:
        return []
    return [f"no licence is stated: those of the sources are {', '.join(sorted(stated))}"]


def unsaid(adapters: Sequence[Adapter], written: Collection[str]) -> list[str]:
    """A note on what headers say and the header that is `written` does not repeat."""
    stated = {key for adapter in adapters for key in adapter.metadata}
    gone = sorted(stated.difference(written, FORMAL))
    return [f"facts of the header that are not carried: {listed(gone, 4)}"] if gone else []


def tensors_sha256(tensors: Mapping[str, TensorInfo], digests: Mapping[str, str]) -> str:
    """One hash over names, dtypes, shapes and bytes, in the order of names."""
    whole = [
        [key, tensors[key].dtype, list(tensors[key].shape), digests[key]] for key in sorted(tensors)
    ]
    return _sha256(json.dumps(whole, separators=(",", ":")))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


def made(adapter: Adapter) -> tuple[Record | None, str | None]:
    """The record an adapter was written with, if it has one; or why it is not carried along."""
    text = adapter.metadata.get(KEY)
    if text is None:
        return None, None
    if len(text) > LONGEST:
        return None, f"its record of how it was made has {len(text):,} characters; left out"
    try:
        return msgspec.json.decode(text, type=Record), None
    except (msgspec.MsgspecError, RecursionError):
        return None, "its record of how it was made cannot be read; left out"
