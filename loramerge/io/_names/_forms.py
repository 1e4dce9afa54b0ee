"""Fused layers and their parts: rows of B taken apart, and put together again, exactly."""

from collections.abc import Sequence
from itertools import accumulate

from msgspec import Struct
from msgspec.structs import replace

from loramerge._lazy import np
from loramerge.adapter import LowRank, Module, TensorSource, paired
from loramerge.io._names._table import Row

__all__ = ["apart", "fits", "holds", "part_heights", "parts", "stacked", "together"]


class Excerpt(Struct, frozen=True):
    """Some rows of a module's B, in a new order, and those of its terms that reach them."""

    whole: Module
    rows: tuple[slice, ...]
    terms: tuple[int, ...] | None = None

    def __call__(self, source: TensorSource, module: Module) -> LowRank:
        update = self.whole.form(source, self.whole)
        A, B = update.A, np.concatenate([update.B[rows] for rows in self.rows])
        if self.terms is None:
            return LowRank(A, B)
        return LowRank(A[list(self.terms)], B[:, list(self.terms)])


class Stack(Struct, frozen=True):
    """Modules over the same inputs, one below the other; None where one is absent.

    A holds their A one below the other and B is block-diagonal; where all share one A, B is their
    B one below the other.
    """

    members: tuple[Module | None, ...]
    heights: tuple[int, ...]
    shared: bool

    def __call__(self, source: TensorSource, module: Module) -> LowRank:
        there = [member for member in self.members if member is not None]
        updates = [member.form(source, member) for member in there]
        A = updates[0].A if self.shared else np.concatenate([update.A for update in updates])
        B = np.zeros((sum(self.heights), len(A)), np.result_type(*[u.B for u in updates]))
        row = term = 0
        for member, height in zip(self.members, self.heights, strict=True):
            if member is not None:
                update = updates.pop(0)
                columns = slice(0, None) if self.shared else slice(term, term + len(update.A))
                B[row : row + height, columns] = update.B * (member.scaling / module.scaling)
                term += len(update.A)
            row += height
        return LowRank(A, B)


def fits(row: Row, module: Module) -> bool:
    """Whether a layer has the shape that the row says."""
    rows = sum(row.shares) * module.in_features
    return not row.shares or (module.out_features == rows and not module.kernel)


def part_heights(row: Row, module: Module) -> tuple[int, ...]:
    """How many rows each part of a layer has."""
    if len(row.parts) == 1:
        return (module.out_features,)
    return tuple(share * module.in_features for share in row.shares)


def holds(row: Row, place: int, shape: tuple[int, int]) -> bool:
    """Whether a layer has such a part of this shape."""
    return not row.shares or shape[0] == row.shares[place] * shape[1]


def parts(source: TensorSource, row: Row, whole: Module) -> list[Module | None]:
    """What a layer is in diffusers; None for a part that it leaves unchanged."""
    if len(row.parts) == 1:
        half = whole.out_features // 2
        if not (row.swapped and half == whole.in_features):
            return [whole]
        halves = slice(half, 2 * half), slice(0, half)
        return [replace(whole, form=Excerpt(whole, halves))]
    return apart(source, whole, part_heights(row, whole))


def apart(source: TensorSource, whole: Module, heights: Sequence[int]) -> list[Module | None]:
    """A fused layer as its parts of so many rows each; None for one that it leaves unchanged.

    Where no term of a fused update reaches two of its parts, as sd-scripts saves `split_qkv` and
    `stacked` makes them, each part gets only its own terms, and one that none reaches is absent.
    Only B itself shows it, and is read.
    """
    ends = accumulate(heights)
    spans = [slice(end - height, end) for end, height in zip(ends, heights, strict=True)]
    found: list[Module | None] = []
    for span, height, own in zip(spans, heights, _own_terms(source, whole, spans), strict=True):
        rank = whole.rank if own is None else len(own)
        form = Excerpt(whole, (span,), own)
        part = replace(whole, out_features=height, rank=rank, form=form)
        found.append(part if rank else None)
    return found


def _own_terms(
    source: TensorSource, whole: Module, spans: Sequence[slice]
) -> list[tuple[int, ...] | None]:
    """The terms that reach each span of rows; None for all, where some term reaches several."""
    everything: list[tuple[int, ...] | None] = [None] * len(spans)
    if whole.gates:
        return everything
    B = whole.form(source, whole).B
    reach = np.stack([B[span].any(axis=0) for span in spans])
    if not reach.any() or (reach.sum(axis=0) > 1).any():
        return everything
    return [tuple(np.flatnonzero(own).tolist()) for own in reach]


def together(source: TensorSource, row: Row, name: str, members: Sequence[Module | None]) -> Module:
    """The layer that diffusers' parts make, None being an absent one."""
    first = next(member for member in members if member is not None)
    if len(row.parts) == 1:
        (whole,) = parts(source, row, first)
        return replace(whole or first, name=name)
    return stacked(source, name, members, part_heights(row, first))


def stacked(
    source: TensorSource, name: str, members: Sequence[Module | None], heights: Sequence[int]
) -> Module:
    """The layer that parts of so many rows each make, None being an absent one.

    Its scaling is that of the parts, or 1 where they differ and are folded into B.
    """
    there = [member for member in members if member is not None]
    first = there[0]
    assert not any(member.gates for member in there)  # SoRA is of models without fused layers
    shared = len(there) == len(members) and _have_one_input(source, there)
    scalings = {member.scaling for member in there}
    dtypes = {member.dtype for member in there}
    return Module(
        name=name,
        kind="linear",
        out_features=sum(heights),
        in_features=first.in_features,
        rank=first.rank if shared else sum(member.rank for member in there),
        scaling=first.scaling if len(scalings) == 1 and first.scaling else 1.0,
        dtype=first.dtype if len(dtypes) == 1 else "F32",
        keys={
            f"{role} {place}": key
            for place, member in enumerate(there)
            for role, key in member.keys.items()
        },
        form=Stack(tuple(members), tuple(heights), shared),
    )


def _have_one_input(source: TensorSource, members: Sequence[Module]) -> bool:
    """Whether all have one A, bit for bit: as taken apart, or as stored."""
    if any(member.form is not paired for member in members):
        wholes = [m.form.whole for m in members if isinstance(m.form, Excerpt) and not m.form.terms]
        return len(wholes) == len(members) and all(whole is wholes[0] for whole in wholes)
    keys = [member.keys["A"] for member in members]
    if len({(source.tensors[key].dtype, source.tensors[key].shape) for key in keys}) > 1:
        return False
    return len({source.read(key) for key in keys}) == 1
