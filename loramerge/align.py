"""Which modules of which adapters belong together; every mismatch is named, all at once."""

from collections.abc import Collection, Sequence
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from loramerge.adapter import Adapter, Module
from loramerge.errors import IncompatibleError, UsageError, listed
from loramerge.patterns import check_match, matches
from loramerge.weights import ModuleWeight, Weights

__all__ = ["Aligned", "Alignment", "align", "reach", "weighed"]


class Aligned(Struct, frozen=True):
    """One module of the result: its counterpart in each adapter and that one's weight in it.

    A counterpart is None where it is absent or has no weight.
    """

    name: str
    members: tuple[Module | None, ...]
    weights: tuple[float, ...]

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


class Alignment(Struct, frozen=True):
    """The modules to compute, and the names of those left out with the reason.

    excluded: by the user; skipped: not in every adapter; weightless: of weight 0 in all of them.
    `partial` names modules that are computed though not every adapter has them.
    """

    modules: tuple[Aligned, ...]
    excluded: tuple[str, ...]
    skipped: tuple[str, ...]
    partial: tuple[str, ...]
    weightless: tuple[str, ...] = ()

    @property
    def left_out(self) -> tuple[str, ...]:
        """Every module of the inputs that is no part of the result."""
        return (*self.excluded, *self.skipped, *self.weightless)


def align(
    adapters: Sequence[Adapter],
    missing: Literal["zero", "skip", "error"],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Alignment:
    """Pair modules by name, in the order of the adapters; every weight is 1.

    Raises IncompatibleError when adapters share no module, when counterparts differ in shape (all
    are listed), or when one is missing and that is not allowed; UsageError for a glob that matches
    nothing.
    """
    names = list(dict.fromkeys(name for adapter in adapters for name in adapter.modules))
    for glob in include:
        check_match(glob, names, f"--include '{glob}' matches no module")
    for glob in exclude:
        check_match(glob, names, f"--exclude '{glob}' matches no module")
    _check_common(adapters)
    chosen = {
        name
        for name in names
        if (not include or any(matches(name, glob) for glob in include))
        and not any(matches(name, glob) for glob in exclude)
    }
    if not chosen:
        raise UsageError("--include and --exclude leave no module.", "leave one of them out")
    aligned = [
        Aligned(name, tuple(a.modules.get(name) for a in adapters), (1.0,) * len(adapters))
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


def weighed(alignment: Alignment, weights: Weights, adapters: Sequence[Adapter]) -> Alignment:
    """Give every adapter its weight in every module, and leave it out where that is 0.

    A module in which no adapter has a weight is left out itself. Raises UsageError for a glob that
    matches nothing, or where no module is left.
    """
    for one in weights.modules:
        where = "" if one.adapter is None else f" of {adapters[one.adapter].reference}"
        said = f"--module-weight '{one.text}' matches no merged module{where}"
        check_match(one.glob, _open_to(one, alignment), said, one.frame)
    modules = tuple(_weighed(module, weights.at(module.name)) for module in alignment.modules)
    kept = tuple(module for module in modules if any(module.members))
    if not kept:
        raise UsageError("Every weight is 0: nothing is left to merge.", "for example: -w 1 -w 0.5")
    weightless = tuple(module.name for module in modules if not any(module.members))
    return replace(alignment, modules=kept, weightless=weightless)


def _weighed(module: Aligned, weights: tuple[float, ...]) -> Aligned:
    pairs = zip(module.members, weights, strict=True)
    return Aligned(module.name, tuple(m if weight else None for m, weight in pairs), weights)


def _open_to(one: ModuleWeight, alignment: Alignment) -> list[str]:
    """The modules that a --module-weight could be for: those its adapter has."""
    place = one.adapter
    return [m.name for m in alignment.modules if place is None or m.members[place]]


def reach(one: ModuleWeight, alignment: Alignment) -> int:
    """How many modules a --module-weight is for."""
    return sum(matches(name, one.glob) for name in _open_to(one, alignment))


def _where(module: Aligned, adapters: Sequence[Adapter]) -> str:
    absent = [
        adapter.reference
        for adapter, member in zip(adapters, module.members, strict=True)
        if member is None
    ]
    return f"{module.name} (not in {', '.join(absent)})"


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
                "two versions of the model's code name them so: loramerge convert "
                f"{other.reference} --to peft --rename {prefixes[1]}={prefixes[0]}",
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
