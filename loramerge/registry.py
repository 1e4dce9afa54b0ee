"""Who offers what: methods and layouts are found by their file names, never listed by hand."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Literal, TypeAlias, TypeVar

from msgspec import Struct

from loramerge.adapter import Array, LowRank, Module, Updates
from loramerge.errors import UsageError
from loramerge.linalg.scales import ScaleName
from loramerge.linalg.spectrum import Spectrum
from loramerge.options import Options, did_you_mean
from loramerge.traits import Cost, Place, Preset, Score, traits

__all__ = [
    "Census",
    "Method",
    "Preset",
    "Score",
    "Sweep",
    "compressor",
    "layout_names",
    "load",
    "merger",
    "method",
    "method_names",
    "methods",
]

Rule: TypeAlias = Callable[[Updates, Any], LowRank | Spectrum]
Trials: TypeAlias = Iterator[tuple[LowRank, Mapping[str, Array]]]
AnyRule = TypeVar("AnyRule", bound=Rule)


def always(options: Options) -> bool:
    """With any options."""
    return True


def never(options: Options) -> bool:
    """With no options."""
    return False


def nothing(options: Options, modules: Sequence[Module]) -> list[str]:
    """Nothing to say."""
    return []


class Sweep(Struct, frozen=True):
    """The option of a method that can be tried over many values while a module is at hand.

    `rule` takes the updates, the options and the values, and gives in their order what the method
    itself would make of each, with further figures by name, [*b], which add up over modules.
    """

    option: str
    rule: Callable[[Updates, Any, Sequence[Any]], Trials]
    example: str


class Census(Struct, frozen=True):
    """What a method must count over the whole adapter before it can merge a module.

    With some options it takes `passes` over all modules. In each, `count` says what a batch adds to
    the sum; counts are added by `+`, which must be exact, as the order is any. `settle` says what
    follows from the sum, given what followed from the pass before (None at first); the method finds
    it in Updates.known, as does `count` in the next pass.
    """

    passes: Callable[[Any], int]
    count: Callable[[Updates, Any], Any]
    settle: Callable[[Any, Any, Any], Any]


class Method(Struct, frozen=True):
    """A registered method: the rule, its options, and what help, docs and the engine must know.

    `takes` says whether it merges many adapters or compresses one; `scale` is its own default for
    --scale. `rank_option` names the option that fixes the rank of its result (cluster's k), and
    `paper_scale` gives the factor its paper puts on a module's result, where there is one. `exact`
    says with which options the rule itself is the weighted sum, so that a measured error is what
    was cut; `every_rank` with which its result has more ranks than the updates together.
    `chooses_rank` says that the rule zeroes terms, which are then left out, module by module.
    `inputs` is the number of adapters it merges, where that is fixed.
    `sweep` is what a table can be drawn over, where there is something, and `census` what must be
    counted over the whole adapter first. `surgery` says that it cuts and joins adapters, and keeps
    their ranks unless it is asked for less. `remarks` are what a user must be told of these options
    with the modules of the inputs; one that begins with `warning: ` is shown in yellow.
    `flat` says with which options all singular values of the result are equal, so that a cut to a
    lower rank takes away as much as it leaves out.
    `siblings` says that it looks at the other modules that read the same input, too, `orthogonal`
    with which options it makes the updates orthogonal to each other before it adds them up.
    `removes` says that its result is the first adapter less something, and is measured against it.
    """

    name: str
    rule: Rule
    options: type[Options]
    takes: Literal["many", "one"]
    paper: str
    example: str
    scale: ScaleName
    presets: tuple[Preset, ...] = ()
    rank_option: str | None = None
    paper_scale: Callable[[Updates, Any], float] | None = None
    exact: Callable[[Any], bool] = never
    every_rank: Callable[[Any], bool] = never
    chooses_rank: bool = False
    inputs: int | None = None
    sweep: Sweep | None = None
    remarks: Callable[[Any, Sequence[Module]], list[str]] = nothing
    census: Census | None = None
    flat: Callable[[Any], bool] = never
    place: Place = "factors"
    cost: Cost = "sum"
    score: Score | None = None
    surgery: bool = False
    siblings: bool = False
    orthogonal: Callable[[Any], bool] = never
    removes: bool = False

    @property
    def documentation(self) -> str:
        """The rule's docstring."""
        return self.rule.__doc__ or ""

    @property
    def summary(self) -> str:
        """Its first line."""
        return self.documentation.strip().splitlines()[0]

    @property
    def needs(self) -> str:
        """What it is given."""
        if self.takes == "one":
            return "one adapter"
        return f"{self.inputs} adapters" if self.inputs else "adapters"

    @property
    def merges(self) -> bool:
        """Whether its result is of all the adapters it is given."""
        return self.takes == "many" and not self.surgery

    @property
    def traits(self) -> str:
        """What it needs, where it works, what it costs and how it scored, in one line."""
        return traits(self.needs, self.place, self.cost, self.score)


_registered: dict[str, Method] = {}


def merger(
    name: str,
    *,
    paper: str,
    options: type[Options],
    example: str,
    scale: ScaleName,
    presets: tuple[Preset, ...] = (),
    rank_option: str | None = None,
    paper_scale: Callable[[Updates, Any], float] | None = None,
    exact: Callable[[Any], bool] = never,
    every_rank: Callable[[Any], bool] = never,
    inputs: int | None = None,
    census: Census | None = None,
    surgery: bool = False,
    sweep: Sweep | None = None,
    flat: Callable[[Any], bool] = never,
    place: Place = "factors",
    cost: Cost = "sum",
    score: Score | None = None,
    siblings: bool = False,
    orthogonal: Callable[[Any], bool] = never,
    removes: bool = False,
) -> Callable[[AnyRule], AnyRule]:
    """Register a rule that merges the updates of many adapters into one."""
    return _registering(
        lambda rule: Method(
            name=name,
            rule=rule,
            options=options,
            takes="many",
            paper=paper,
            example=example,
            scale=scale,
            presets=presets,
            rank_option=rank_option,
            paper_scale=paper_scale,
            exact=exact,
            every_rank=every_rank,
            inputs=inputs,
            census=census,
            surgery=surgery,
            sweep=sweep,
            flat=flat,
            place=place,
            cost=cost,
            score=score,
            siblings=siblings,
            orthogonal=orthogonal,
            removes=removes,
        )
    )


def compressor(
    name: str,
    *,
    paper: str,
    options: type[Options],
    example: str,
    chooses_rank: bool = False,
    exact: Callable[[Any], bool] | None = None,
    every_rank: Callable[[Any], bool] = never,
    surgery: bool = False,
    sweep: Sweep | None = None,
    remarks: Callable[[Any, Sequence[Module]], list[str]] = nothing,
    score: Score | None = None,
) -> Callable[[AnyRule], AnyRule]:
    """Register a rule that recomputes the update of one adapter."""
    return _registering(
        lambda rule: Method(
            name=name,
            rule=rule,
            options=options,
            takes="one",
            paper=paper,
            example=example,
            scale="paper",
            exact=exact or (never if chooses_rank else always),
            every_rank=every_rank,
            surgery=surgery,
            chooses_rank=chooses_rank,
            sweep=sweep,
            remarks=remarks,
            score=score,
        )
    )


def _registering(describe: Callable[[Rule], Method]) -> Callable[[AnyRule], AnyRule]:
    def register(rule: AnyRule) -> AnyRule:
        found = describe(rule)
        _registered[found.name] = found
        return rule

    return register


@cache
def method_names() -> tuple[str, ...]:
    """Every method by name, without importing one."""
    return _public_modules("loramerge.algorithms")


@cache
def methods() -> dict[str, Method]:
    """Every method by name, sorted; found by file name in `loramerge/algorithms`."""
    for name in method_names():
        importlib.import_module(f"loramerge.algorithms.{name}")
    return dict(sorted(_registered.items()))


def method(name: str) -> Method:
    """One method. Raises UsageError with the closest name when there is none."""
    if name in method_names():  # one file is imported, not all: it starts faster
        importlib.import_module(f"loramerge.algorithms.{name}")
    found = _registered.get(name)
    if found is None:
        close = did_you_mean(name, methods())
        raise UsageError(
            f"There is no method '{name}'.",
            f"did you mean '{close}'?" if close else "see: loramerge methods",
        )
    return found


@cache
def layout_names() -> tuple[str, ...]:
    """Every layout by name; found by file name in `loramerge/io`."""
    return _public_modules("loramerge.io")


def load(layout: str) -> Any:
    """The module of one layout."""
    return importlib.import_module(f"loramerge.io.{layout}")


def _public_modules(package: str) -> tuple[str, ...]:
    path = importlib.import_module(package).__path__
    names = (module.name for module in pkgutil.iter_modules(path))
    return tuple(sorted(name for name in names if not name.startswith("_")))
