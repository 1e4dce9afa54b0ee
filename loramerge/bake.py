"""Full weights of a model with an adapter added: shard by shard, in the shards' own dtypes."""

import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from msgspec import Struct

from loramerge._lazy import np
from loramerge.adapter import Adapter, Extra
from loramerge.compute import SAVE_DTYPES, encode, holds_numbers, resolve, single_threaded_blas
from loramerge.derive import check_base, stored_turned, updated
from loramerge.errors import IncompatibleError, OutputError, listed
from loramerge.events import Advanced, Listener, Started, silent
from loramerge.io._checkpoint import Checkpoint
from loramerge.io._hub import fetch
from loramerge.io._layout import Stored, Written
from loramerge.io._peft_keys import clean
from loramerge.io._source import Source, open_source
from loramerge.io._write import check_free, staged, start_file

__all__ = ["Baked", "bake"]

# What belongs to a model beside its weights; nothing that could run code.
COMPANIONS = (".json", ".txt", ".model", ".jinja", ".tiktoken")
FLOATS = frozenset(SAVE_DTYPES.values())
Content = Callable[[], bytes]


class Baked(Struct, frozen=True):
    """What was written: modules whose weight changed, tensors replaced, all tensors, bytes."""

    modules: int
    replaced: tuple[str, ...]
    tensors: int
    shards: int
    nbytes: int


def bake(
    adapter: Adapter, base: Checkpoint, final: Path, force: bool, listen: Listener = silent
) -> Baked:
    """Write the base with the adapter's updates added, into a directory: all of it, or nothing.

    W + s B A in float32, or DoRA's rescaled sum, rounded once to the dtype of W. Heads and biases
    that the adapter replaces are replaced. Raises IncompatibleError for an adapter that is not of
    this base, or holds more than the base has a place for; OutputError as every output.
    """
    others = [v for v in adapter.variants if not v.name.startswith("DoRA")]
    if others:
        raise IncompatibleError(
            f"{adapter.reference} is {others[0].name}: {others[0].reason}.", others[0].hint
        )
    check_base(adapter, base)
    _check_whole(base)
    check_free(final, force)
    fetch([adapter], listen)
    changed = _changed(adapter, base)
    replaced = _replaced(adapter, base, changed)
    with staged(final, force) as directory:
        listen(Started("baking", len(changed)))
        for shard in base.shards:
            _write_shard(base, shard, directory, {**changed, **replaced}, listen)
        folders = base.path.glob("[!.]*/*") if base.parts else ()
        for path in sorted([*base.path.glob("*"), *folders]):
            if path.suffix in COMPANIONS and path.is_file():
                place = directory / path.relative_to(base.path)
                place.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, place)
        size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return Baked(len(changed), tuple(sorted(replaced)), len(base.holders), len(base.shards), size)


def _check_whole(base: Checkpoint) -> None:
    """Raise IncompatibleError for a pipeline of which not every model can be written."""
    models = {path.parent.name for path in base.path.glob("*/config.json") if base.parts}
    if lacking := sorted(models - base.parts.keys()):
        raise IncompatibleError(
            f"{base.path.name} holds no safetensors weights of {listed(lacking)}, which the result "
            "would lack.",
            "download them, or add --rank N: an adapter needs the models alone that it adapts",
        )


def _changed(adapter: Adapter, base: Checkpoint) -> dict[str, Content]:
    """How to compute every weight that an update is added to."""
    found: dict[str, Content] = {}
    turned = bool(adapter.config.get("fan_in_fan_out"))
    for name, module in adapter.modules.items():
        key = base.weight(name)
        assert key is not None  # check_base
        info = base.holders[key].tensors[key]
        if info.dtype not in FLOATS:
            raise IncompatibleError(
                f"{key} is stored as {info.dtype}, which cannot be written.", "save it as float32"
            )
        if key in found:
            raise IncompatibleError(f"Two modules of the adapter add to {key}.", "rename one")

        def content(
            name: str = name, back: bool = stored_turned(module, turned), dtype: str = info.dtype
        ) -> bytes:
            W = updated(adapter, base, name)
            if not np.isfinite(W).all():
                raise IncompatibleError(f"{name}: W + dW is not finite.", "use another checkpoint")
            data: bytes = encode(W.T if back else W, dtype).tobytes()
            if not holds_numbers(data, dtype):
                raise IncompatibleError(f"{name} overflows {dtype}.", "use a wider base model")
            return data

        found[key] = content
    return found


def _replaced(adapter: Adapter, base: Checkpoint, changed: Collection[str]) -> dict[str, Content]:
    """Heads and biases that the adapter holds in full. Raises IncompatibleError for the others.

    PEFT saves the weight under an adapted embedding too, which is the base's own.
    """
    take_out = f"take it out first: loramerge convert {adapter.reference} --to peft --extras drop"
    found: dict[str, Content] = {}
    homeless: list[str] = []
    for extra in adapter.extras:
        key = _home(extra, base)
        if key is None or base.holders[key].tensors[key].shape != extra.info.shape:
            homeless.append(f"{extra.key}: {extra.role}")
            continue
        dtype = base.holders[key].tensors[key].dtype
        if key in changed:
            if not np.array_equal(adapter.source.array(extra.key), base.array(key)):
                raise IncompatibleError(
                    f"{extra.key} is another weight than {key} in {base.path.name}, and adapted.",
                    "name the base model that this adapter was trained on, or merge it in PEFT",
                )
            continue

        def content(own: str = extra.key, stored: str = extra.info.dtype, to: str = dtype) -> bytes:
            same, source = stored == to, adapter.source
            data: bytes = source.read(own) if same else encode(source.array(own), to).tobytes()
            if not holds_numbers(data, to):
                raise IncompatibleError(f"{own} is not finite as {to}.", take_out)
            return data

        found[key] = content
    if homeless:
        raise IncompatibleError(
            f"{base.path.name} has no place for {listed(homeless, 4)}.",
            take_out,
        )
    return found


def _home(extra: Extra, base: Checkpoint) -> str | None:
    """The tensor of the base that an extra stands for."""
    if extra.role not in ("saved module", "bias"):
        return None
    name = clean(extra.key).replace(".base_layer.", ".")
    return base.weight(name)


def _write_shard(
    base: Checkpoint,
    shard: Source,
    directory: Path,
    contents: Mapping[str, Content],
    listen: Listener,
) -> None:
    """One shard with the tensors that changed, in its place, read back as written."""
    path = directory / shard.path.relative_to(base.path)
    path.parent.mkdir(exist_ok=True)
    part = f"{path.parent.name}." if base.parts else ""
    stored = tuple(
        Stored(key.removeprefix(part), info.dtype, info.shape, content=partial(shard.read, key))
        for key, info in shard.tensors.items()
    )
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        writer = start_file(descriptor, Written(stored, shard.metadata))

        def put(one: Stored) -> tuple[str, str]:
            data = contents.get(part + one.key, one.content)()
            writer.write(one.key, data)
            if part + one.key in contents:
                listen(Advanced(1))
            return one.key, hashlib.sha256(data).hexdigest()

        threads = resolve("cpu", "float32").threads
        with single_threaded_blas(), ThreadPoolExecutor(threads) as pool:
            digests = dict(pool.map(put, stored))
    finally:
        os.close(descriptor)
    written = open_source(path)
    wrong = [k for k, d in digests.items() if hashlib.sha256(written.read(k)).hexdigest() != d]
    written.close()
    if wrong:
        raise OutputError(f"{path.name} reads back wrong: {listed(wrong)}.", "check the disk")
