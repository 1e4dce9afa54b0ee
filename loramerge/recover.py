"""Adapters trained on a pruned model, for the whole model (LoRAM, arXiv:2502.13533).

Structured pruning removes hidden units of MLPs and heads of attentions: rows of some projections,
columns of others. Zeros take their places in B and A, which is exactly the update that was trained.
"""

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from loramerge._lazy import np
from loramerge.adapter import Adapter, Extra, LowRank, Module, TensorSource
from loramerge.errors import AdapterError, IncompatibleError, listed
from loramerge.io._files import PICKLES, SUFFIX, is_pickle
from loramerge.io._names import Heads
from loramerge.io._peft_keys import owner
from loramerge.io._pickle import open_pickle
from loramerge.io._source import open_source

__all__ = ["read_pruned", "recovered"]

# The tensor of an index file: the rows that were removed from the module the file is named after.
REMOVED = "pruned_idx"
WHOLE_NUMBERS = re.compile(r"[IU]\d+")
# Which modules lost the same rows, and which lost them as columns, by the module of the index.
ROWS = {
    "gate_proj": ("gate_proj", "up_proj"),
    "k_proj": ("k_proj", "v_proj"),
    **{leaf: (leaf,) for leaf in ("up_proj", "v_proj", "q_proj")},
}
COLUMNS = {"gate_proj": "down_proj", **{leaf: leaf for leaf in ("down_proj", "o_proj")}}
# Heads of keys are shared by groups of queries, which are removed with them.
KEYS, QUERIES, OUTPUT = "k_proj", "q_proj", "o_proj"
OTHER_INDEX = "name the directory of the pruning that this adapter was trained on"
# Of a layer or an expert.
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def read_pruned(directories: Iterable[str], allow_pickle: bool = False) -> dict[str, list[int]]:
    """The removed rows of every module that an index file is named after, as LoRAM writes them.

    model.layers.4.mlp.gate_proj.pt holds pruned_idx; so may a .safetensors file. Raises
    AdapterError for a directory without any, for two that differ, for numbers that are no places,
    and for pickles unless they are allowed.
    """
    found: dict[str, list[int]] = {}
    for directory in directories:
        folder = Path(directory).expanduser()
        if not folder.is_dir():
            raise AdapterError(f"{directory} is no directory of index files.", OTHER_INDEX)
        files = sorted(f for f in folder.glob("*") if f.suffix in (SUFFIX, *PICKLES))
        if not files:
            raise AdapterError(f"{directory} holds no index of pruned rows.", OTHER_INDEX)
        for file in files:
            places = _places(file, allow_pickle)
            if found.setdefault(file.stem, places) != places:
                raise AdapterError(
                    f"{file} and another index of {file.stem} differ.", "take one of them away"
                )
    return found


def _places(file: Path, allow_pickle: bool) -> list[int]:
    """What one index file holds, in order."""
    if file.suffix != SUFFIX and not allow_pickle:
        raise is_pickle(file)
    source = open_source(file) if file.suffix == SUFFIX else open_pickle(file)
    if REMOVED not in source.tensors:
        raise AdapterError(f"{file} holds no tensor {REMOVED}.", OTHER_INDEX)
    dtype = source.tensors[REMOVED].dtype
    if not WHOLE_NUMBERS.fullmatch(dtype):
        raise AdapterError(
            f"{file}: {REMOVED} is stored as {dtype}; places are whole numbers.", OTHER_INDEX
        )
    return sorted(int(place) for place in source.scalars(REMOVED))


class Scattered(Struct, frozen=True):
    """The factors of a module with zeros where rows or columns were removed."""

    whole: Module
    rows: frozenset[int] = frozenset()
    columns: frozenset[int] = frozenset()

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) with what was removed."""
        m, n = self.whole.shape
        return m + len(self.rows), n + len(self.columns)

    def __call__(self, source: TensorSource, module: Module) -> LowRank:
        update = self.whole.form(source, self.whole)
        m, n = self.shape
        A = np.zeros((len(update.A), n), update.A.dtype)
        B = np.zeros((m, len(update.A)), update.B.dtype)
        A[:, np.setdiff1d(np.arange(n), list(self.columns))] = update.A
        B[np.setdiff1d(np.arange(m), list(self.rows))] = update.B
        return LowRank(A, B)


class Lost(Struct, frozen=True):
    """The places of what the pruning removed, by the module that had them."""

    rows: dict[str, list[int]]
    columns: dict[str, list[int]]

    def claim(self, side: dict[str, list[int]], module: str, places: list[int]) -> None:
        """Note what an index says. Raises IncompatibleError where another says otherwise."""
        if side.setdefault(module, places) != places:
            raise IncompatibleError(
                f"Two indexes of the pruning differ for {module}.", "take one of them away"
            )


def recovered(
    adapter: Adapter,
    removed: Mapping[str, list[int]],
    heads: Heads | None = None,
    kept: Collection[Extra] = (),
) -> Adapter:
    """The adapter for the model that was not pruned. LoRAM's zero recovery, without noise in A.

    An index of gate_proj speaks for up_proj and, by columns, for down_proj; one of k_proj for
    v_proj and, with the queries that share a head of keys, for q_proj and o_proj. `heads` are
    needed where the shapes of the adapter do not say how many queries share one. `kept` are the
    tensors beside its factors that the result will hold. Raises IncompatibleError where an index
    fits no module, not the rows there are, no whole heads, or a tensor that is kept.
    """
    lost = _lost(adapter, removed, heads)
    touched = lost.rows.keys() | lost.columns.keys()
    if not touched & adapter.modules.keys():
        raise IncompatibleError(
            f"{adapter.reference} has none of the modules that the pruning speaks of: "
            f"{listed(list(removed), 3)}.",
            OTHER_INDEX,
        )
    if cut := [e.key for e in kept if owner(e) in touched]:
        raise IncompatibleError(
            f"{adapter.reference} holds {len(cut)} tensors that replace the base model's, in the "
            f"size that pruning left: {listed(cut, 3)}.",
            "--extras drop leaves them out",
        )
    modules = {
        name: _whole(module, lost.rows.get(name, []), lost.columns.get(name, []))
        for name, module in adapter.modules.items()
    }
    notes = (*adapter.assumed, *_notes(modules, touched))
    return replace(adapter, modules=modules, assumed=notes)


def _lost(adapter: Adapter, removed: Mapping[str, list[int]], heads: Heads | None) -> Lost:
    """What every index says of the modules around it."""
    lost = Lost({}, {})
    for name, places in removed.items():
        parent, dot, leaf = name.rpartition(".")
        stem = parent + dot
        if leaf not in ROWS and leaf not in COLUMNS:
            known = listed(sorted({*ROWS, *COLUMNS}))
            raise IncompatibleError(
                f"The pruning speaks of {name}, which is none of {known}.", OTHER_INDEX
            )
        for part in ROWS.get(leaf, ()):
            lost.claim(lost.rows, stem + part, places)
        if leaf in COLUMNS:
            lost.claim(lost.columns, stem + COLUMNS[leaf], places)
        if leaf == KEYS and {stem + QUERIES, stem + OUTPUT} & adapter.modules.keys():
            share = _share(adapter, stem, heads)
            _check_heads(name, places)
            queries = [share * place + number for place in places for number in range(share)]
            lost.claim(lost.rows, stem + QUERIES, queries)
            lost.claim(lost.columns, stem + OUTPUT, queries)
    return lost


def _share(adapter: Adapter, stem: str, heads: Heads | None) -> int:
    """How many heads of queries share one of keys: from shapes, or as the user says."""
    found = {name: adapter.modules.get(stem + name) for name in (QUERIES, OUTPUT, *ROWS[KEYS])}
    queries = [m.out_features for m in (found[QUERIES],) if m]
    queries += [m.in_features for m in (found[OUTPUT],) if m]
    keys = [m.out_features for name in ROWS[KEYS] if (m := found[name])]
    said = None if heads is None else heads[0] // heads[1]
    if not keys and said is None:
        raise IncompatibleError(
            f"{adapter.reference}: {stem}* adapts neither keys nor values, so that nothing says "
            "how many heads of queries share one of theirs.",
            "say how many heads queries and keys have: --heads 64,8",
        )
    share, rest = divmod(queries[0], keys[0]) if keys else (said or 1, 0)
    if rest or said not in (None, share):
        wrong = "no whole number" if rest else f"not {said}"
        raise IncompatibleError(
            f"{adapter.reference}: {stem}* has {queries[0]} rows of queries for {keys[0]} of keys, "
            f"{wrong} for each.",
            OTHER_INDEX if rest else "leave --heads out: the shapes tell",
        )
    return share


def _check_heads(name: str, places: list[int]) -> None:
    """Raise IncompatibleError unless runs of removed rows begin and end where heads may."""
    edges = set(places) ^ {place + 1 for place in places}
    if math.gcd(*edges) == 1:
        raise IncompatibleError(
            f"The {len(places)} removed rows of {name} are no whole heads, so that nothing says "
            "which rows of queries went with them.",
            OTHER_INDEX,
        )


def _notes(modules: Mapping[str, Module], touched: Collection[str]) -> Iterator[str]:
    """What was put back, and what looks as if the pruning were another's."""
    whole = [name for name in modules if name in touched]
    yield f"what pruning removed is back, as zeros, in {len(whole)} of {len(modules)} modules"
    shapes: dict[str, set[tuple[int, int]]] = {}
    for name, module in modules.items():
        shapes.setdefault(NUMBER.sub("*", name), set()).add(module.shape)
    differing = [
        f"{alike} ({', '.join(f'{m} x {n}' for m, n in sorted(found))})"
        for alike, found in shapes.items()
        if len(found) > 1
    ]
    if differing:
        yield (
            "layers that are mostly alike differ in size, as with the index of another pruning: "
            f"{listed(differing, 3)}"
        )


def _whole(module: Module, rows: list[int], columns: list[int]) -> Module:
    """The module with what was removed from it."""
    if not rows and not columns:
        return module
    form = Scattered(module, frozenset(rows), frozenset(columns))
    m, n = form.shape
    for places, size, what in ((rows, m, "rows"), (columns, n, "columns")):
        if len(set(places)) < len(places) or not set(places) <= set(range(size)):
            raise IncompatibleError(
                f"{module.name}: the places of {len(places)} removed {what} do not fit the "
                f"{size - len(places)} there are.",
                OTHER_INDEX,
            )
    return replace(module, out_features=m, in_features=n, form=form)
