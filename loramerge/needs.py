"""What a conversion must know besides the file itself, and what is then made of the adapter."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from loramerge.adapter import Adapter, Extra, Module, source_name
from loramerge.errors import IncompatibleError, UsageError, listed
from loramerge.io._checkpoint import Checkpoint
from loramerge.io._names import Heads, Projections, in_form, remarks, renamed
from loramerge.rebase import rebased, recomputed
from loramerge.recover import read_pruned, recovered
from loramerge.translation import heads_text

__all__ = ["NO_NEEDS", "Alphas", "Needs", "recorded_needs"]

Alphas: TypeAlias = Literal["fold", "keep"]


class Needs(Struct, frozen=True):
    """What a file does not say, and some conversions must know.

    `initial`, or `base` where that is enough: what an adapter started from that changed its base.
    `pruned`: directories with the rows that its base had lost. `heads`: of queries, and of keys
    and values. `projections`: the form of those of language models, as they are unless given.
    `renames`: prefixes of module names, and what takes their place. `alphas`: whether those of a
    PEFT adapter are folded where they differ, or kept in an alpha_pattern.
    """

    initial: Adapter | None = None
    base: Checkpoint | None = None
    pruned: tuple[str, ...] = ()
    heads: Heads | None = None
    projections: Projections | None = None
    renames: tuple[tuple[str, str], ...] = ()
    alphas: Alphas = "fold"
    allow_pickle: bool = False

    def plain(self, adapter: Adapter, kept: Collection[Extra] = ()) -> Adapter:
        """The adapter against its whole and unchanged base model, with those of its extras."""
        if self.initial is not None and self.base is not None:
            raise UsageError("convert takes only one of --initial and --base.", "leave --base out")
        typed: list[str] = []
        if self.initial is not None:
            adapter = rebased(adapter, self.initial)
            typed += ["--initial", source_name(self.initial)]
        elif self.base is not None:
            adapter = recomputed(adapter, self.base)
            typed += ["--base", self.base.path.name]
        if self.pruned:
            removed = read_pruned(self.pruned, self.allow_pickle)
            adapter = recovered(adapter, removed, self.heads, kept)
            typed += [word for place in self.pruned for word in ("--pruned", Path(place).name)]
            typed += ["--allow-pickle"] if self.allow_pickle else []
        if not typed:
            return adapter
        start = adapter.derived or ("convert", source_name(adapter))
        return replace(adapter, derived=(*start, *typed))

    def named(self, adapter: Adapter, naming: str) -> Adapter:
        """The adapter with names of a vocabulary, and its projections in the form asked for."""
        adapter = _under_other_prefixes(adapter, self.renames)
        if self.projections is not None and adapter.naming == "model":
            adapter = in_form(adapter, self.projections, self.heads)
        there = renamed(adapter, naming, self.heads)
        if self.projections is None or adapter.naming == "model":
            return there
        return in_form(there, self.projections, self.heads)

    def told(self, adapter: Adapter, there: Adapter) -> list[str]:
        """What to say of its projections, now that it is `there`."""
        if self.projections is None:
            return []
        before = replace(self, projections=None).named(adapter, there.naming)
        return remarks(before, there, self.projections)

    @property
    def typed(self) -> list[str]:
        """Those among them that no file holds, as they are typed."""
        return [
            *(["--projections", self.projections] if self.projections else []),
            *(word for old, new in self.renames for word in ("--rename", f"{old}={new}")),
            *(["--alphas", self.alphas] if self.alphas != "fold" else []),
            *(["--heads", heads_text(self.heads)] if self.heads else []),
        ]

    @property
    def facts(self) -> dict[str, object]:
        """What a record says of them: the form; files are named with what was typed."""
        return {
            **({"heads": list(self.heads)} if self.heads else {}),
            **({"projections": self.projections} if self.projections else {}),
            **({"renames": [list(pair) for pair in self.renames]} if self.renames else {}),
            **({"alphas": self.alphas} if self.alphas != "fold" else {}),
        }


NO_NEEDS = Needs()


def recorded_needs(options: Mapping[str, Any]) -> Needs:
    """What `facts` said, from a record."""
    heads = options.get("heads")
    renames = tuple((old, new) for old, new in options.get("renames", ()))
    return Needs(
        heads=heads and tuple(heads),
        projections=options.get("projections"),
        renames=renames,
        alphas=options.get("alphas", "fold"),
    )


def _under_other_prefixes(adapter: Adapter, renames: Sequence[tuple[str, str]]) -> Adapter:
    """The adapter with other prefixes of names; the first that fits a name counts."""
    modules: dict[str, Module] = {}
    for name, module in adapter.modules.items():
        pairs = (new + name.removeprefix(old) for old, new in renames if name.startswith(old))
        target = next(pairs, name)
        if target in modules:
            raise IncompatibleError(
                f"{adapter.reference}: two modules would be called {target}.",
                "name longer prefixes with --rename",
            )
        modules[target] = replace(module, name=target)
    if renames and modules.keys() == adapter.modules.keys():
        olds = listed([old for old, _ in renames])
        raise IncompatibleError(
            f"{adapter.reference} has no module whose name begins with {olds}: its first is "
            f"{next(iter(modules))}.",
            "look at them: loramerge inspect --modules",
        )
    return replace(adapter, modules=modules)
