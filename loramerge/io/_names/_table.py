"""Tables of layer names: one family of models, its components, and what each vocabulary calls them.

The hub of all translations are diffusers' names, <component>.<path>, which name the smallest parts:
other vocabularies fuse some of them. A row says so once for all numbers, written {}.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cache

from msgspec import Struct, field

__all__ = ["Component", "Family", "Row", "Spelling", "identical", "rows"]


class Row(Struct, frozen=True):
    """A layer as it is called in some vocabulary, and the layers it is in diffusers.

    Where these are several, their weights stand one below the other. `shares` are the rows of each
    as multiples of its columns, where they are known. `swapped`: a weight of two rows per column,
    shift and scale, is stored in diffusers as scale and shift.
    """

    name: str
    parts: tuple[str, ...]
    shares: tuple[int, ...] = ()
    swapped: bool = False


def rows(names: Mapping[str, str], prefix: str = "", target: str | None = None) -> tuple[Row, ...]:
    """Rows of {name: name in diffusers} below two paths."""
    below = prefix if target is None else target
    return tuple(Row(prefix + name, (below + part,)) for name, part in names.items())


def identical(table: Iterable[Row]) -> tuple[Row, ...]:
    """Diffusers' own names of the same layers, as rows."""
    return tuple(Row(part, (part,)) for row in table for part in row.parts)


class Spelling(Struct, frozen=True):
    """One way to write the names of a table: below a prefix, `flat` with _ in place of dots."""

    prefix: str
    rows: tuple[Row, ...]
    flat: bool = False

    def written(self, row: Row) -> str:
        """The name of a row in this spelling, numbers left open."""
        return self.prefix + (row.name.replace(".", "_") if self.flat else row.name)


class Component(Struct, frozen=True):
    """A model of a pipeline by diffusers' name, and its spellings by vocabulary.

    The first spelling of a vocabulary is the one that is written, the others are read as well.
    """

    name: str
    spellings: Mapping[str, tuple[Spelling, ...]]


class Found(Struct, frozen=True):
    """A name that was recognised: its row, its numbers, and the parts' full names in diffusers."""

    row: Row
    parts: tuple[str, ...]


class Spelt(Struct, frozen=True):
    """What a part in diffusers' names belongs to: a layer by its name, and which of its parts."""

    name: str
    place: int
    whole: Found


class Family(Struct, frozen=True, eq=False):
    """Models of one architecture.

    `called` finds them in what a file says of its base model, in small letters and digits only;
    `depths` are the numbers of blocks of each kind that released models have. `leaves_only` are
    diffusers' names into others': names of others mean another family's layers.
    """

    name: str
    called: str
    components: tuple[Component, ...]
    depths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    leaves_only: bool = False

    def parse(self, naming: str, name: str) -> Found | None:
        """What a name of a vocabulary stands for, None where the family has no such layer."""
        for entry in _readers(self, naming).get(_shape(name), ()):
            if numbers := _pattern(entry.name).fullmatch(name):
                return entry.found(numbers)
        return None

    def spell(self, naming: str, part: str) -> Spelt | None:
        """The layer of a vocabulary that holds a part named as in diffusers."""
        for entry, full, place in _writers(self, naming).get(_shape(part), ()):
            if numbers := _pattern(full).fullmatch(part):
                return Spelt(_filled(entry.name, numbers), place, entry.found(numbers))
        return None


class Entry(Struct, frozen=True):
    """A row in one spelling, numbers left open."""

    name: str
    row: Row
    component: str

    def found(self, numbers: re.Match[str]) -> Found:
        """The row with its numbers."""
        parts = (f"{self.component}.{_filled(part, numbers)}" for part in self.row.parts)
        return Found(self.row, tuple(parts))


def _shape(name: str) -> str:
    """A name with every number the same: what it shares with the entry that explains it."""
    return re.sub(r"\d+|\{\}", "0", name)


@cache
def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\{\}", r"(\d+)"))


def _filled(name: str, numbers: re.Match[str]) -> str:
    return name.format(*numbers.groups())


@cache
def _readers(family: Family, naming: str) -> Mapping[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for component in family.components:
        for spelling in component.spellings.get(naming, ()):
            for row in spelling.rows:
                entry = Entry(spelling.written(row), row, component.name)
                found.setdefault(_shape(entry.name), []).append(entry)
    return found


@cache
def _writers(family: Family, naming: str) -> Mapping[str, list[tuple[Entry, str, int]]]:
    found: dict[str, list[tuple[Entry, str, int]]] = {}
    for component in family.components:
        for spelling in component.spellings.get(naming, ())[:1]:
            for row in spelling.rows:
                entry = Entry(spelling.written(row), row, component.name)
                for place, part in enumerate(row.parts):
                    full = f"{component.name}.{part}"
                    found.setdefault(_shape(full), []).append((entry, full, place))
    return found
