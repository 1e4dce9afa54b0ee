"""What converting an adapter into another layout will do, decided from its header alone."""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from loramerge._version import __version__
from loramerge.adapter import Adapter, Module, paired, pinned_name, source_name
from loramerge.errors import IncompatibleError, UsageError, listed
from loramerge.io._checkpoint import Checkpoint
from loramerge.io._layout import ROUNDING, Draft, Layout, alpha_of
from loramerge.io._names import Heads, Projections, in_form, renamed
from loramerge.io._open import layout, layouts, written_as
from loramerge.plan import assumed, check_variants
from loramerge.publish import free_place, stem
from loramerge.rebase import rebased, recomputed
from loramerge.record import Canonical, Record, source, unsaid
from loramerge.recover import read_pruned, recovered

__all__ = ["SINGLE", "Conversion", "Needs", "plan_conversion", "recorded_needs"]

SINGLE = ".safetensors"
OF_MERGES = re.compile(r"--(to out|include|exclude|layout)\b")
TAKE_OUT = "choose another layout, or take modules out first: loramerge select --exclude GLOB"


class Needs(Struct, frozen=True):
    """What a file does not say, and some conversions must know.

    `initial`, or `base` where that is enough: what an adapter started from that changed its base.
    `pruned`: directories with the rows that its base had lost. `heads`: of queries, and of keys
    and values. `projections`: the form of those of language models, as they are unless given.
    """

    initial: Adapter | None = None
    base: Checkpoint | None = None
    pruned: tuple[str, ...] = ()
    heads: Heads | None = None
    projections: Projections | None = None
    allow_pickle: bool = False

    def plain(self, adapter: Adapter, to: str) -> Adapter:
        """The adapter against its whole and unchanged base model."""
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
            adapter = recovered(adapter, read_pruned(self.pruned, self.allow_pickle), self.heads)
            typed += [word for place in self.pruned for word in ("--pruned", Path(place).name)]
        if not typed and not adapter.derived:
            return adapter
        start = adapter.derived or ("convert", source_name(adapter))
        return replace(adapter, derived=(*start, *typed, "--to", to))

    def named(self, adapter: Adapter, naming: str) -> Adapter:
        """The adapter with names of a vocabulary, and its projections in the form asked for."""
        if self.projections is not None and adapter.naming == "model":
            adapter = in_form(adapter, self.projections, self.heads)
        there = renamed(adapter, naming, self.heads)
        if self.projections is None or adapter.naming == "model":
            return there
        return in_form(there, self.projections, self.heads)

    @property
    def facts(self) -> dict[str, object]:
        """What a record says of them: the form; files are named with what was typed."""
        return {
            **({"heads": list(self.heads)} if self.heads else {}),
            **({"projections": self.projections} if self.projections else {}),
        }


NO_NEEDS = Needs()


def recorded_needs(options: Mapping[str, Any]) -> Needs:
    """What `facts` said, from a record."""
    heads = options.get("heads")
    return Needs(heads=heads and tuple(heads), projections=options.get("projections"))


class Conversion(Struct, frozen=True):
    """What will be done, from the header alone.

    `adapter` has the names of the target; `folded` are the modules whose scale goes into B.
    """

    original: Adapter
    adapter: Adapter
    layout: Layout
    draft: Draft
    folded: tuple[str, ...]
    final: Path
    force: bool
    notes: tuple[str, ...]
    needs: Needs = NO_NEEDS
    tokenizer: Mapping[str, Path] = field(default_factory=dict)

    @property
    def typed(self) -> list[str]:
        """The command that makes the result again."""
        words = list(self.original.derived or ("convert", pinned_name(self.original)))
        words += [] if "--to" in words else ["--to", self.layout.name]
        words += ["--alpha", f"{self.original.alpha:.17g}"] if self.original.alpha else []
        words += ["--projections", self.needs.projections] if self.needs.projections else []
        words += ["--heads", ",".join(map(str, self.needs.heads))] if self.needs.heads else []
        dropped = len(self.draft.extras) < len(self.original.extras)
        return ["loramerge", *words, *(["--extras", "drop"] if dropped else [])]

    @property
    def carried(self) -> set[str]:
        """Keys of the source whose content is in the result."""
        pairs = {key for m in self.original.modules.values() for key in m.keys.values()}
        return pairs | {extra.key for extra in self.draft.extras}

    def record(self, sha256: str) -> Record:
        """How the result is made, and from what."""
        options = {
            "to": self.layout.name,
            "extras": "carry" if self.draft.extras else "drop",
            "single": self.final.suffix == SINGLE,
            **self.needs.facts,
        }
        recipe = Canonical("convert", (1.0,), (self.original.alpha,), options, {})
        return Record(recipe, (source(self.original, sha256),), __version__)


def plan_conversion(
    adapter: Adapter,
    to: str,
    out: str | None,
    *,
    extras: str = "error",
    force: bool = False,
    needs: Needs = NO_NEEDS,
) -> Conversion:
    """Check that a layout can hold an adapter, and decide what its scale becomes.

    Raises IncompatibleError for what is no plain LoRA, for names without a counterpart, and for
    extras the layout has no place for unless they are to be dropped; OutputError for a place that
    is taken.
    """
    if extras not in ("error", "drop"):
        raise UsageError(f"--extras is '{extras}'.", "one of: error, drop")
    target = layout(to)
    if target.writes:
        raise UsageError(f"{to} is only read.", f"results of it are written as {target.writes}")
    adapter = needs.plain(adapter, to)
    check_variants([adapter])
    name = f"{stem(adapter)}-{to}{'' if target.directory else SINGLE}"
    final = free_place([adapter], out or name, force)
    with _advised(_keeping(adapter)):
        there = needs.named(adapter, target.naming or adapter.naming)
    holds = target.scale
    if holds == "multiplier" and final.suffix == SINGLE:
        holds = "none"  # it stands in the config beside
    exact = written_as(adapter) == adapter.layout or all(
        module.form is paired for module in adapter.modules.values()
    )
    modules, folded, widened = _modules(there, replace(target, scale=holds), exact)
    fits = written_as(adapter) == to
    if adapter.extras and not fits and extras == "error":
        what = listed([f"{extra.key}: {extra.role}" for extra in adapter.extras], 4)
        raise IncompatibleError(
            f"{adapter.reference} holds {len(adapter.extras)} tensors beside its LoRA that {to} "
            f"has no place for: {what}.",
            "--extras drop leaves them out",
        )
    kept = adapter.extras if fits and extras == "error" else ()
    files = adapter.tokenizer if extras == "error" else {}
    draft = Draft(modules, (there,), kept, len({module.rank for module in modules}) == 1)
    with _advised(TAKE_OUT):
        notes = [*assumed(adapter), *_lost(adapter, target, draft)]
    if folded:
        notes.append(
            f"{to} cannot say the scale of {len(folded)} of {len(modules)} modules: it is folded "
            "into B"
        )
    if widened:
        notes.append(
            f"{len(widened)} modules are stored as float32, in which folding rounds by 6e-8: "
            f"{listed(widened, 3)}"
        )
    if padded := sum(m.rank > there.modules[m.name].rank for m in modules):
        notes.append(f"{padded} modules are zero-padded to the one rank of {to} (exact)")
    if len(there.modules) != len(adapter.modules):
        notes.append(
            f"{len(adapter.modules)} modules are {len(there.modules)} in {to}: fused there, or here"
        )
    return Conversion(
        adapter, there, target, draft, tuple(folded), final, force, tuple(notes), needs, files
    )


@contextmanager
def _advised(hint: str) -> Iterator[None]:
    """Another hint where the one of a layout names flags of merges, which convert has not."""
    try:
        yield
    except IncompatibleError as error:
        if error.hint and OF_MERGES.search(error.hint):
            raise IncompatibleError(error.message, hint) from None
        raise


def _keeping(adapter: Adapter) -> str:
    """Where names cannot be translated: the layouts in which they are the same."""
    kept = [one.name for one in layouts() if one.naming == adapter.naming and not one.writes]
    return f"layouts that keep its names: {', '.join(kept) or 'none'}"


def _modules(
    adapter: Adapter, target: Layout, exact: bool
) -> tuple[tuple[Module, ...], list[str], list[str]]:
    """Modules as stored, those whose scale is folded, and those stored wider for it."""
    highest, found, folded, widened = adapter.max_rank, [], [], []
    scalings = _held(list(adapter.modules.values()), target)
    for module in adapter.modules.values():
        scaling = scalings.get(module.name, 1.0)
        dtype = module.dtype
        if module.gates or not exact:
            dtype = "F64" if dtype == "F64" else "F32"
        if module.gates or scaling != module.scaling:
            folded.append(module.name)
            if dtype in ("F16", "BF16") and not _power_of_two(module.scaling / scaling):
                dtype = "F32"
                widened.append(module.name)
        # PEFT says the rank of all parameters once.
        rank = highest if target.one_rank or module.kind == "parameter" else module.rank
        found.append(replace(module, rank=rank, scaling=scaling, dtype=dtype, keys={}, gates=()))
    return tuple(found), folded, widened


def _held(modules: list[Module], target: Layout) -> dict[str, float]:
    """The scale that a layout can say of each module; none where it must be folded."""
    own = {module.name: module.scaling for module in modules}
    if target.scale == "alphas":
        return {name: scaling for name, scaling in own.items() if scaling != 0}
    first = modules[0]
    if target.scale == "multiplier":
        return own if set(own.values()) == {first.scaling} else {}
    alpha = alpha_of(first)
    if target.scale == "alpha" and all(
        abs(alpha / m.rank - m.scaling) <= ROUNDING * abs(m.scaling) for m in modules
    ):
        return own
    if target.scale == "alpha":
        highest = max(module.rank for module in modules)
        return {module.name: highest / module.rank for module in modules}
    return {}


def _power_of_two(factor: float) -> bool:
    """Whether multiplying by a factor keeps every bit."""
    return abs(math.frexp(factor)[0]) == 0.5


def _lost(adapter: Adapter, target: Layout, draft: Draft) -> list[str]:
    """What the source says and the result does not."""
    notes = []
    if len(draft.extras) < len(adapter.extras):
        dropped = [f"{extra.key}: {extra.role}" for extra in adapter.extras]
        notes.append(f"dropped: {listed(dropped)}")
    notes += unsaid([adapter], target.write(draft).metadata)
    if adapter.config.get("fan_in_fan_out") and target.name != "peft":
        notes.append(f"{target.name} has no place for fan_in_fan_out true")
    return notes
