"""Which modules of which adapters belong together; every mismatch is named, all at once."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from loramerge.adapter import Adapter, Module
from loramerge.errors import IncompatibleError, UsageError, listed
from loramerge.options import did_you_mean

__all__ = ["Aligned", "Alignment", "align"]


@dataclass(frozen=True, slots=True)
class Aligned:
    """One module of the result and its counterpart in each adapter, None where it is absent."""

    name: str
    members: tuple[Module | None, ...]

    @property
    def model(self) -> Module:
        """The first counterpart there is; all have the same kind, shape and kernel."""
        return next(member for member in self.members if member is not None)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of the counterparts that are there."""
        return tuple(member.rank for member in self.members if member is not None)

    @property
    def cap(self) -> int:
        """The largest rank the weighted sum can have: s, or min(m, n)."""
        return min(sum(self.ranks), *self.model.shape)


@dataclass(frozen=True, slots=True)
class Alignment:
    """The modules to compute, and the names of those left out with the reason."""

    modules: tuple[Aligned, ...]
    excluded: tuple[str, ...]
    skipped: tuple[str, ...]
    partial: tuple[str, ...]


def align(
    adapters: Sequence[Adapter],
    missing: Literal["zero", "skip", "error"],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Alignment:
    """Pair modules by name, in the order of the adapters.

    Raises IncompatibleError when adapters share no module, when counterparts differ in shape (all
    are listed), or when one is missing and that is not allowed; UsageError for a glob that matches
    nothing.
    """
    names = list(dict.fromkeys(name for adapter in adapters for name in adapter.modules))
    _check_globs(include, names, "--include")
    _check_globs(exclude, names, "--exclude")
    _check_common(adapters)
    chosen = {
        name
        for name in names
        if (not include or any(fnmatchcase(name, glob) for glob in include))
        and not any(fnmatchcase(name, glob) for glob in exclude)
    }
    if not chosen:
        raise UsageError("--include and --exclude leave no module.", "leave one of them out")
    aligned = [
        Aligned(name, tuple(adapter.modules.get(name) for adapter in adapters))
        for name in names
        if name in chosen
    ]
    _check_shapes(adapters, aligned)
    partial = [module for module in aligned if None in module.members]
    if partial and missing == "error":
        count = f"{len(partial)} module{'s are' if len(partial) > 1 else ' is'}"
        raise IncompatibleError(
            f"{count} missing in some adapters: "
            f"{listed([_where(module, adapters) for module in partial], 4)}.",
            "--missing zero lets them contribute nothing, --missing skip leaves them out",
        )
    kept = [m for m in aligned if missing != "skip" or None not in m.members]
    if not kept:
        raise IncompatibleError("No module is in every adapter.", "leave out --missing skip")
    return Alignment(
        modules=tuple(kept),
        excluded=tuple(name for name in names if name not in chosen),
        skipped=tuple(m.name for m in partial if missing == "skip"),
        partial=tuple(m.name for m in partial if missing == "zero"),
    )


def _where(module: Aligned, adapters: Sequence[Adapter]) -> str:
    absent = [
        adapter.reference
        for adapter, member in zip(adapters, module.members, strict=True)
        if member is None
    ]
    return f"{module.name} (not in {', '.join(absent)})"


def _check_globs(globs: Sequence[str], names: Sequence[str], flag: str) -> None:
    for glob in globs:
        if any(fnmatchcase(name, glob) for name in names):
            continue
        plain = glob.strip("*.")
        leaves = {name.rpartition(".")[2] for name in names}
        leaf = plain if plain in leaves else did_you_mean(plain, leaves)
        close = f"*.{leaf}" if leaf else did_you_mean(glob, names)
        raise UsageError(
            f"{flag} '{glob}' matches no module.",
            f"did you mean '{close}'?" if close else f"a module is called '{names[0]}'",
        )


def _check_common(adapters: Sequence[Adapter]) -> None:
    first = adapters[0]
    for other in adapters[1:]:
        if first.modules.keys() & other.modules.keys():
            continue
        mine, theirs = next(iter(first.modules)), next(iter(other.modules))
        message = (
            f"{first.reference} and {other.reference} have no module in common: "
            f"one has '{mine}', the other '{theirs}'"
        )
        if prefixes := _prefixes(first.modules, other.modules):
            raise IncompatibleError(
                f"{message}; only the prefixes '{prefixes[0]}' and '{prefixes[1]}' differ.",
                "two versions of the model's code name them so; save both with the same one",
            )
        raise IncompatibleError(
            f"{message}.",
            f"see what each adapts: loramerge inspect {first.reference} {other.reference}",
        )


def _prefixes(mine: Collection[str], theirs: Collection[str]) -> tuple[str, str] | None:
    """The two prefixes in which all names differ, if nothing else differs but a version."""
    name = next(iter(mine))
    parts = name.split(".")
    for start in range(len(parts)):
        tail = ".".join(parts[start:])
        for other in theirs:
            if not f".{other}".endswith(f".{tail}"):
                continue
            old, new = name.removesuffix(tail), other.removesuffix(tail)
            renamed = all(new + one.removeprefix(old) in theirs for one in mine)
            if renamed and not any(character.isdigit() for character in old + new):
                return old, new
    return None


def _check_shapes(adapters: Sequence[Adapter], aligned: Sequence[Aligned]) -> None:
    problems: list[str] = []
    for module in aligned:
        shapes = {
            adapter.reference: f"{member.kind} {member.out_features}x{member.in_features}"
            + (f" kernel {'x'.join(map(str, member.kernel))}" if member.kernel else "")
            for adapter, member in zip(adapters, module.members, strict=True)
            if member is not None
        }
        if len(set(shapes.values())) > 1:
            sides = ", ".join(f"{shape} in {name}" for name, shape in shapes.items())
            problems.append(f"{module.name} {sides}")
    if problems:
        count = f"{len(problems)} module{'s differ' if len(problems) > 1 else ' differs'}"
        raise IncompatibleError(
            f"{count} in shape: {'; '.join(problems)}.",
            "these adapters seem to be for different base models: loramerge inspect "
            + " ".join(adapter.reference for adapter in adapters),
        )
