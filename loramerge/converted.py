"""The same adapter in another layout: factors bit for bit, no arithmetic but where it must be.

A layout says of the scale what it can: an alpha for each module, one for all, one multiplier, or
nothing. A scale that it cannot say is folded into B, in float32, once.
"""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from loramerge._lazy import np
from loramerge._version import __version__
from loramerge.adapter import Adapter, Array, LowRank, Module
from loramerge.beside import flawed
from loramerge.card import converted_card
from loramerge.compute import encode, finite, flaw, resolve
from loramerge.conversion import SINGLE, Conversion
from loramerge.engine import file_sha256
from loramerge.errors import IncompatibleError, listed
from loramerge.events import Listener, silent
from loramerge.filling import Filling
from loramerge.io._files import CARD
from loramerge.io._hub import fetch
from loramerge.io._layout import ROUNDING, Written
from loramerge.io._open import open_adapter
from loramerge.io._source import decode
from loramerge.io._write import staged
from loramerge.linalg.factors import pad
from loramerge.publish import PROVENANCE, copy_tokenizer
from loramerge.record import KEY, UNKNOWN

__all__ = ["Converted", "convert"]


class Converted(Struct, frozen=True):
    """What was written; `rounded` are the modules whose factors lost bits in the stored dtype.

    `not_finite` are the keys of what is carried beside them, and holds NaN or Inf.
    """

    plan: Conversion
    rounded: tuple[str, ...]
    not_finite: tuple[str, ...]
    tensors: int
    file_bytes: int
    source_sha256: str
    tensors_sha256: str
    machine: str
    versions: Mapping[str, str]
    device: str = "cpu"

    @property
    def path(self) -> Path:
        """Where it was written."""
        return self.plan.final

    @property
    def notes(self) -> tuple[str, ...]:
        """What was folded, rounded, dropped, assumed."""
        notes = [*self.plan.notes, *flawed(self.not_finite)]
        if self.rounded:
            notes.append(f"rounded to the stored dtype: {listed(list(self.rounded), 4)}")
        return tuple(notes)

    @property
    def coverage(self) -> str:
        """How much of the source is in the result."""
        modules, stored = self.plan.original.modules, self.plan.original.source.tensors
        return (
            f"{len(modules)} of {len(modules)} modules, {len(self.plan.carried)} of {len(stored)} "
            "tensors"
        )

    def as_json(self) -> dict[str, Any]:
        """What is kept beside the weights: no timestamps, no paths."""
        record = self.plan.record(self.source_sha256)
        return {
            "recipe": msgspec.to_builtins(record.recipe),
            "sources": [msgspec.to_builtins(one) for one in record.sources],
            "device": self.device,
            "machine": self.machine,
            "versions": dict(self.versions),
            "layout": self.plan.layout.name,
            "modules": len(self.plan.draft.modules),
            "modules_read": len(self.plan.original.modules),
            "tensors": self.tensors,
            "tensors_read": len(self.plan.carried),
            "folded": list(self.plan.folded),
            "rounded": list(self.rounded),
            "scale_assumed": self.plan.original.scale_assumed,
            "notes": list(self.notes),
            "not_finite": list(self.not_finite),
            "tensors_sha256": self.tensors_sha256,
        }


def convert(plan: Conversion, listen: Listener = silent) -> Converted:
    """Write the result: all of it, or nothing.

    What was written is read again as a stranger's file and must hold the same modules and scales.
    Raises IncompatibleError where a factor is not finite or the layout cannot say what a module is
    (MLX tells embeddings by their names), OutputError where a tensor reads back wrong.
    """
    written = plan.layout.write(plan.draft)
    text = plan.record(UNKNOWN).text()
    written = replace(written, metadata={**written.metadata, KEY: text})
    fetch([plan.original], listen)
    with staged(plan.final, plan.force) as directory:
        single = plan.final.suffix == SINGLE
        path = directory / (plan.final.name if single else plan.layout.weights)
        done = _fill(plan, written, path)
        if not single:
            for name, content in written.companions.items():
                (directory / name).write_bytes(content)
            text = json.dumps(done.as_json(), indent=1, sort_keys=True, ensure_ascii=False)
            (directory / PROVENANCE).write_text(text + "\n", "utf-8", errors="replace")
            (directory / CARD).write_text(_card(done), "utf-8", errors="replace")
            copy_tokenizer(plan.tokenizer, directory)
        _check(plan, str(path))
    return done


def _card(done: Converted) -> str:
    plan, said = done.plan, [done.coverage, *done.notes]
    return converted_card(plan.original, plan.layout.name, plan.typed, done.source_sha256, said)


def _fill(plan: Conversion, written: Written, path: Path) -> Converted:
    """Write every factor of every module."""
    rounded: list[str] = []
    filling = Filling(written, path)

    def one(module: Module) -> None:
        update = _factors(plan.adapter, module)
        if not finite(update):
            raise IncompatibleError(
                f"{plan.original.reference}: {module.name} holds {flaw(update)}.",
                "the training diverged, or the file is damaged; use an earlier checkpoint",
            )
        A, B = filling.put(module.name, "A", update.A), filling.put(module.name, "B", update.B)
        if not (np.array_equal(A, update.A) and np.array_equal(B, update.B)):
            rounded.append(module.name)

    compute = resolve("cpu", "float32")
    try:
        with ThreadPoolExecutor(compute.threads) as pool:
            digest = pool.submit(file_sha256, plan.original.source)
            list(pool.map(one, plan.draft.modules))
            sha256 = digest.result()
            tensors = filling.close({KEY: plan.record(sha256).text()}, pool)
    finally:
        filling.let_go()
    return Converted(
        plan,
        tuple(sorted(rounded)),
        tuple(filling.not_finite),
        tensors=len(written.tensors),
        file_bytes=path.stat().st_size,
        source_sha256=sha256,
        tensors_sha256=tensors,
        machine=compute.machine(),
        versions={"loramerge": __version__, **compute.versions()},
    )


def _factors(adapter: Adapter, stored: Module) -> LowRank:
    """A and B as they will be stored: as they are, B times what the layout cannot say."""
    module = adapter.modules[stored.name]
    if module.gates:
        update, factor = adapter.read(module.name), 1 / stored.scaling
    else:
        update = module.form(adapter.source, module)
        factor = module.scaling / stored.scaling
    if factor != 1:
        update = LowRank(update.A, _rounded(update.B * update.B.dtype.type(factor), stored.dtype))
    return pad(update, stored.rank)


def _rounded(values: Array, dtype: str) -> Array:
    """What folding gives in the stored dtype, once: not counted as lost there again."""
    return decode(encode(values, dtype).data.cast("B"), dtype, "B").reshape(values.shape)


def _check(plan: Conversion, path: str) -> None:
    """Raise IncompatibleError unless the file reads as the modules it was made of."""
    again = open_adapter(path)
    wrong = [
        module.name
        for module in plan.draft.modules
        if (found := again.modules.get(module.name)) is None
        or _outline(found) != _outline(module)
        or abs(found.scaling - module.scaling) > ROUNDING * abs(module.scaling)
    ]
    if wrong or len(again.modules) != len(plan.draft.modules):
        raise IncompatibleError(
            f"{plan.layout.name} cannot say what {len(wrong)} of {len(plan.draft.modules)} modules "
            f"are: {listed(wrong, 4)}.",
            "choose a layout that can: loramerge layouts",
        )


def _outline(module: Module) -> tuple[object, ...]:
    return module.kind, module.shape, module.rank, module.kernel
