"""Adapters trained on a pruned model, for the whole model (LoRAM, arXiv:2502.13533).

Structured pruning removes hidden units of MLPs and heads of attentions: rows of some projections,
columns of others. Zeros take their places in B and A, which is exactly the update that was trained.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from loramerge._lazy import np
from loramerge.adapter import Adapter, LowRank, Module, TensorSource
from loramerge.errors import AdapterError, IncompatibleError, listed
from loramerge.io._files import PICKLES, SUFFIX, is_pickle
from loramerge.io._names import Heads
from loramerge.io._pickle import open_pickle
from loramerge.io._source import open_source

__all__ = ["read_pruned", "recovered"]

# The tensor of an index file: the rows that were removed from the module the file is named after.
REMOVED = "pruned_idx"
# Which modules lost the same rows, and which lost them as columns, by the module of the index.
ROWS = {"gate_proj": ("gate_proj", "up_proj"), "k_proj": ("k_proj", "v_proj")}
COLUMNS = {"gate_proj": "down_proj"}
# Heads of keys are shared by groups of queries, which are removed with them.
KEYS, QUERIES, OUTPUT = "k_proj", "q_proj", "o_proj"
OTHER_INDEX = "name the directory of the pruning that this adapter was trained on"


def read_pruned(directories: Iterable[str], allow_pickle: bool = False) -> dict[str, list[int]]:
    """The removed rows of every module that an index file is named after, as LoRAM writes them.

    model.layers.4.mlp.gate_proj.pt holds pruned_idx; so may a .safetensors file. Raises
    AdapterError for a directory without any, and for pickles unless they are allowed.
    """
    found: dict[str, list[int]] = {}
    for directory in directories:
        folder = Path(directory).expanduser()
        files = sorted(f for f in folder.glob("*") if f.suffix in (SUFFIX, *PICKLES))
        if not files:
            raise AdapterError(f"{directory} holds no index of pruned rows.", OTHER_INDEX)
        for file in files:
            if file.suffix != SUFFIX and not allow_pickle:
                raise is_pickle(file)
            source = open_source(file) if file.suffix == SUFFIX else open_pickle(file)
            if REMOVED not in source.tensors:
                raise AdapterError(f"{file} holds no tensor {REMOVED}.", OTHER_INDEX)
            found[file.stem] = [int(place) for place in source.scalars(REMOVED)]
    return found


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


def recovered(
    adapter: Adapter, removed: Mapping[str, list[int]], heads: Heads | None = None
) -> Adapter:
    """The adapter for the model that was not pruned. LoRAM's zero recovery, without noise in A.

    An index of gate_proj speaks for up_proj and, by columns, for down_proj; one of k_proj for
    v_proj and, with the queries that share a head of keys, for q_proj and o_proj. `heads` are
    needed where the shapes of the adapter do not say how many queries share one. Raises
    IncompatibleError where an index fits no module, or not the rows there are.
    """
    rows: dict[str, list[int]] = {}
    columns: dict[str, list[int]] = {}
    for name, places in removed.items():
        parent, dot, leaf = name.rpartition(".")
        stem = parent + dot
        rows |= {stem + part: places for part in ROWS.get(leaf, (leaf,))}
        if leaf in COLUMNS:
            columns[stem + COLUMNS[leaf]] = places
        if leaf == KEYS and {stem + QUERIES, stem + OUTPUT} & adapter.modules.keys():
            share = _share(adapter, stem, heads)
            queries = [share * place + number for place in places for number in range(share)]
            rows[stem + QUERIES] = columns[stem + OUTPUT] = queries
    if not (rows.keys() | columns.keys()) & adapter.modules.keys():
        raise IncompatibleError(
            f"{adapter.reference} has none of the modules that the pruning speaks of: "
            f"{listed(list(removed), 3)}.",
            OTHER_INDEX,
        )
    modules = {
        name: _whole(module, rows.get(name, []), columns.get(name, []))
        for name, module in adapter.modules.items()
    }
    return replace(adapter, modules=modules)


def _share(adapter: Adapter, stem: str, heads: Heads | None) -> int:
    """How many heads of queries share one of keys: from shapes, or as the user says."""
    found = {name: adapter.modules.get(stem + name) for name in (QUERIES, OUTPUT, *ROWS[KEYS])}
    queries = [m.out_features for m in (found[QUERIES],) if m]
    queries += [m.in_features for m in (found[OUTPUT],) if m]
    keys = [m.out_features for name in ROWS[KEYS] if (m := found[name])]
    if keys:
        return queries[0] // keys[0]
    if heads is None:
        raise IncompatibleError(
            f"{adapter.reference}: {stem}* adapts neither keys nor values, so that nothing says "
            "how many heads of queries share one of theirs.",
            "say how many heads queries and keys have: --heads 64,8",
        )
    return heads[0] // heads[1]


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
