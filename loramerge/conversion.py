"""What converting an adapter into another layout will do, decided from its header alone."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from msgspec import Struct, field
from msgspec.structs import replace

from loramerge._version import __version__
from loramerge.adapter import Adapter, Extra, Module, paired, pinned_name
from loramerge.errors import IncompatibleError, UsageError, listed
from loramerge.io._checkpoint import open_checkpoint
from loramerge.io._layout import ROUNDING, Draft, Layout, alpha_of
from loramerge.io._open import layout, layouts, written_as
from loramerge.io._peft_keys import clean, owner
from loramerge.needs import NO_NEEDS, Needs
from loramerge.plan import assumed, check_variants
from loramerge.publish import free_place, stem
from loramerge.record import Canonical, Record, source, unsaid
from loramerge.translation import CONVERT, Translation

__all__ = ["SINGLE", "Conversion", "conversion_name", "plan_conversion", "plan_translation"]

SINGLE = ".safetensors"
OF_MERGES = re.compile(r"--(to out|include|exclude|layout)\b")
LEAVE_OUT = "leave --alphas out: alphas are kept where the layout has a place for them"
TAKE_OUT = "choose another layout, or take modules out first: loramerge select --exclude GLOB"


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
    def adapters(self) -> tuple[Adapter, ...]:
        """Everything that is read, as a plan of a method has it."""
        return (self.original, *([self.needs.initial] if self.needs.initial else []))

    @property
    def typed(self) -> list[str]:
        """The command that makes the result again."""
        words = list(self.original.derived or (CONVERT, pinned_name(self.original)))
        words += ["--to", self.layout.name]
        words += ["--alpha", f"{self.original.alpha:.17g}"] if self.original.alpha else []
        words += self.needs.typed
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
        recipe = Canonical(CONVERT, (1.0,), (self.original.alpha,), options, {})
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
    adapter = needs.plain(adapter, adapter.extras if extras == "error" else ())
    check_variants([adapter])
    inputs = [adapter, *([needs.initial] if needs.initial else [])]
    final = free_place(inputs, out or conversion_name(adapter, to), force)
    with _advised(_keeping(adapter)):
        there = needs.named(adapter, target.naming or adapter.naming)
    holds = target.scale
    if holds == "multiplier" and final.suffix == SINGLE:
        holds = "none"  # it stands in the config beside
    if needs.alphas == "keep":
        if holds != "alpha":
            raise UsageError(f"--alphas keep is for PEFT; {to} has no alpha_pattern.", LEAVE_OUT)
        holds = "alphas"
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
    _check_names(adapter, there, kept, needs.renames)
    files = adapter.tokenizer if extras == "error" else {}
    draft = Draft(modules, (there,), kept, len({module.rank for module in modules}) == 1)
    with _advised(TAKE_OUT):
        notes = [*assumed(there), *_lost(adapter, target, draft), *needs.told(adapter, there)]
    if folded:
        kept_by = " (--alphas keep writes an alpha_pattern)" if holds == "alpha" and exact else ""
        notes.append(
            f"{to} cannot say the scale of {len(folded)} of {len(modules)} modules: it is folded "
            f"into B{kept_by}"
        )
    if widened:
        notes.append(
            f"{len(widened)} modules are stored as float32, in which folding rounds by 6e-8: "
            f"{listed(widened, 3)}"
        )
    if padded := sum(m.rank > there.modules[m.name].rank for m in modules):
        notes.append(
            f"zero-padded to the one rank of {to}, exactly: {padded} of {len(modules)} modules"
        )
    if len(there.modules) != len(adapter.modules):
        notes.append(
            f"{len(adapter.modules)} modules are {len(there.modules)} in {to}: fused there, or here"
        )
    return Conversion(
        adapter, there, target, draft, tuple(folded), final, force, tuple(notes), needs, files
    )


def conversion_name(adapter: Adapter, to: str) -> str:
    """What a conversion is called by default, in the current directory."""
    return f"{stem(adapter)}-{to}{'' if layout(to).directory else SINGLE}"


def plan_translation(
    asked: Translation,
    inputs: Sequence[Adapter],
    out: str | None,
    *,
    force: bool = False,
    allow_pickle: bool = False,
) -> Conversion:
    """What was asked for on the command line or in a recipe, of its adapters, opened."""
    source, *start = inputs
    options = asked.options
    needs = Needs(
        initial=start[0] if start else None,
        base=None if options.base is None else open_checkpoint(options.base),
        pruned=options.pruned,
        heads=asked.heads,
        projections=options.projections,
        renames=asked.renames,
        alphas=options.alphas,
        allow_pickle=allow_pickle,
    )
    return plan_conversion(source, asked.to, out, extras=options.extras, force=force, needs=needs)


@contextmanager
def _advised(hint: str) -> Iterator[None]:
    """Another hint where the one of a layout names flags of merges, which convert has not."""
    try:
        yield
    except IncompatibleError as error:
        if error.hint and OF_MERGES.search(error.hint):
            raise IncompatibleError(error.message, hint) from None
        raise


def _check_names(
    adapter: Adapter,
    there: Adapter,
    kept: Sequence[Extra],
    renames: Sequence[tuple[str, str]],
) -> None:
    """Raise IncompatibleError for extras whose modules have other names in the result."""
    gone = adapter.modules.keys() - there.modules.keys()
    olds = tuple(old for old, _ in renames)
    if left := [e.key for e in kept if owner(e) in gone or clean(e.key).startswith(olds)]:
        raise IncompatibleError(
            f"{adapter.reference} holds {len(left)} tensors of modules that have another name in "
            f"the result: {listed(left, 3)}.",
            "--extras drop leaves them out",
        )


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
