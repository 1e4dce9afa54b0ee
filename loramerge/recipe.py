"""A recipe: which method, on which adapters, with which values. One declaration for every way in.

The command line, Python and YAML all end here, with flat names: a method's own options and the
settings every computing command shares.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from loramerge.errors import UsageError
from loramerge.linalg.ranks import Criterion
from loramerge.linalg.scales import ScaleName
from loramerge.options import Option, Options, build, describe
from loramerge.registry import Method, Preset, method, method_names, methods
from loramerge.settings import BOUNDS, REFINEMENTS, RULES, MergeSettings, Settings
from loramerge.weights import Weights, check_places, module_weight

__all__ = ["Named", "Recipe", "find", "fixed", "flags", "make_recipe", "options_of", "settings_of"]


class Named(Struct, frozen=True):
    """One input as the user named it: reference, weight, and --alpha and --from where given.

    Factors that it leaves out are in what is `shared`.
    """

    reference: str
    weight: float = 1.0
    alpha: float | None = None
    layout: str | None = None
    shared: str | None = None


class Recipe(Struct, frozen=True):
    """A checked recipe: every value of the right type and in range."""

    method: Method
    adapters: tuple[Named, ...]
    options: Options
    settings: Settings

    @property
    def name(self) -> str:
        """What errors call it: its method."""
        return self.method.name

    @property
    def merge(self) -> MergeSettings:
        """The settings of a merge; for a compressor their defaults."""
        return self.settings if isinstance(self.settings, MergeSettings) else MergeSettings()

    @property
    def scale(self) -> float | ScaleName:
        """--scale as asked for, or the method's own default; pico's own length is far too short."""
        if self.merge.scale is not None:
            return self.merge.scale
        return "auto" if self.merge.calibrate == "pico" else self.method.scale

    @property
    def weights(self) -> Weights:
        """--weight of every adapter, and every --module-weight."""
        return Weights(
            tuple(named.weight for named in self.adapters),
            tuple(map(module_weight, self.merge.module_weight)),
        )

    @property
    def criterion(self) -> Criterion | None:
        """What bounds the ranks, where it is more than a rank known from the headers."""
        s = self.settings
        found = Criterion(
            energy=s.energy,
            max_error=s.max_error,
            size=None if s.size is None else parse_size(s.size),
            sv_ratio=s.sv_ratio,
            sv_cumulative=s.sv_cumulative,
            sv_fro=s.sv_fro,
            step=s.round_to or 1,
            kohya=s.compat == "kohya",
        )
        if any(getattr(s, bound) is not None for bound in BOUNDS if bound != "rank"):
            return found
        if isinstance(s.rank, int) and s.allocate not in (None, "uniform"):
            return replace(found, rank=s.rank)
        if self.method.chooses_rank and s.rank is None:
            return replace(found, energy=1.0)  # terms that the method zeroed are left out
        return None

    def canonical(self) -> dict[str, Any]:
        """Everything that decides the result, defaults included, without paths or outputs."""
        settings = msgspec.to_builtins(self.settings)
        return {
            "method": self.method.name,
            "weights": [named.weight for named in self.adapters],
            "alphas": [named.alpha for named in self.adapters],
            "options": msgspec.to_builtins(self.options),
            "settings": {name: value for name, value in settings.items() if name != "device"},
        }


def find(name: str) -> tuple[Method, Preset | None]:
    """A method by its name or by the name of one of its presets."""
    if name in method_names():
        return method(name), None
    for found in methods().values():
        for preset in found.presets:
            if preset.name == name:
                return found, preset
    return method(name), None


def options_of(found: Method) -> list[Option]:
    """Everything one command takes: the method's own options, then the shared settings.

    Defaults a method decides (--scale, --rank) are filled in.
    """
    rank = None if found.takes == "one" else found.rank_option or "max"
    decided: dict[str, object] = {"scale": found.scale, "rank": rank}
    shared = [
        replace(option, default=decided.get(option.name, option.default))
        for option in describe(settings_of(found))
    ]
    return describe(found.options) + shared


def fixed(preset: Preset | None) -> tuple[str, ...]:
    """The options a preset decides: its values, and every bound on the rank where it has one."""
    values = preset.values if preset else {}
    bounds = (*BOUNDS, *REFINEMENTS) if set(BOUNDS) & set(values) else ()
    return tuple(dict.fromkeys([*values, *bounds]))


def settings_of(found: Method) -> type[Settings]:
    """The settings a method shares with its kind."""
    return MergeSettings if found.takes == "many" else Settings


def make_recipe(name: str, adapters: Sequence[Named], values: Mapping[str, object]) -> Recipe:
    """Check flat values against the method's declarations.

    Raises UsageError that names the option, the bad value and the allowed range.
    """
    found, preset = find(name)
    if preset and (refused := [key for key in values if key in fixed(preset)]):
        raise UsageError(
            f"{name} is {same_as(found, preset)}; it takes no {flags(refused)}.",
            f"use: loramerge {found.name}",
        )
    values = {**(preset.values if preset else {}), **values}
    own = {option.name for option in describe(found.options)}
    shared = {option.name for option in describe(settings_of(found))}
    options = {key: value for key, value in values.items() if key in own or key not in shared}
    settings = {key: value for key, value in values.items() if key in shared and key not in own}
    recipe = Recipe(
        method=found,
        adapters=tuple(adapters),
        options=build(found.options, options, name, also=shared),
        settings=build(settings_of(found), settings, name),
    )
    _check(recipe, name)
    return recipe


def same_as(found: Method, preset: Preset) -> str:
    """The command a preset stands for: arithmetic --rank full."""
    values = [f"{flags([key])} {value}" for key, value in preset.values.items()]
    return " ".join([found.name, *values])


def flags(names: Iterable[str]) -> str:
    """Options as they are typed: -k and --max-error."""
    flags = [f"-{n}" if len(n) == 1 else "--" + n.strip("_").replace("_", "-") for n in names]
    return " and ".join(flags)


def _check(recipe: Recipe, name: str) -> None:
    s = recipe.settings
    if s.size is not None:
        parse_size(s.size)
    weights = recipe.weights
    example = f"for example: {recipe.method.example}"
    if recipe.method.takes == "one":
        if len(recipe.adapters) != 1:
            raise UsageError(f"{name} takes one adapter, not {len(recipe.adapters)}.")
    elif not recipe.adapters:
        raise UsageError(f"{name} needs adapters.", example)
    elif recipe.method.inputs not in (None, len(recipe.adapters)):
        raise UsageError(
            f"{name} takes {recipe.method.inputs} adapters, not {len(recipe.adapters)}.", example
        )
    _check_ranks(recipe, name)
    _check_calibration(recipe, name)
    for named in recipe.adapters:
        if not math.isfinite(named.weight):
            raise UsageError(
                f"{name}: --weight is {named.weight}; it must be a finite number.",
                "for example: -w 1 -w -0.5",
            )
        if named.alpha is not None and not (math.isfinite(named.alpha) and named.alpha > 0):
            raise UsageError(
                f"{name}: --alpha is {named.alpha:g}; it must be a number > 0.",
                "for example: --alpha 16",
            )
    check_places(weights)


def _check_ranks(recipe: Recipe, name: str) -> None:
    """Raise UsageError where what bounds the ranks is missing, or does not go together."""
    s = recipe.settings
    given = [bound for bound in BOUNDS if getattr(s, bound) is not None]
    ruled = bool(set(given) & set(RULES))
    alone = [bound for bound in given if not (bound == "rank" and ruled)]
    bound = recipe.options.bound
    if bound and given:
        raise UsageError(f"{name} takes only one of {bound} and {flags(given)}.", "leave one out")
    found = recipe.method
    if not (given or bound or found.takes == "many" or found.chooses_rank or found.surgery):
        raise UsageError(
            f"{name} needs to know how small: --rank, --energy, --max-error or --size.",
            f"for example: {recipe.method.example}",
        )
    if len(alone) > 1:
        raise UsageError(f"{name} takes only one of {flags(alone)}.", "leave out all but one")
    if s.allocate is not None and (not given or ruled or isinstance(s.rank, str)):
        raise UsageError(
            f"{name}: --allocate needs --rank N, --energy, --max-error or --size.",
            "for example: --rank 8",
        )
    if s.round_to is not None and recipe.criterion is None:
        raise UsageError(
            f"{name}: --round-to needs ranks to choose: --energy, --max-error, --size, --sv-fro "
            "or --allocate.",
            "for example: --energy 0.99",
        )
    if s.round_to is not None and isinstance(s.rank, int) and s.round_to > s.rank:
        raise UsageError(
            f"{name}: --round-to {s.round_to} is more than --rank {s.rank}.",
            f"for example: --rank {s.round_to}",
        )
    if s.compat is not None and not ruled:
        raise UsageError(
            f"{name}: --compat {s.compat} needs --sv-ratio, --sv-cumulative or --sv-fro.",
            "for example: --sv-fro 0.9",
        )
    if recipe.options.needs_rank and recipe.criterion is not None:
        raise UsageError(
            f"{name}: {recipe.options.needs_rank} needs a rank that is the same for every module.",
            "for example: --rank 8",
        )


def _check_calibration(recipe: Recipe, name: str) -> None:
    """Raise UsageError where --calibrate has nothing to hold to."""
    found, calibration = recipe.method, recipe.merge.calibrate
    if calibration is None:
        return
    reason, hint = None, "leave out --calibrate"
    if found.surgery:
        reason = "it cuts and joins adapters, and adds nothing up"
    elif calibration == "pico" and found.siblings:
        reason = "it compares a module with its siblings, which pico would not hold back"
    elif calibration == "svc" and found.flat(recipe.options):
        reason = "its singular values are equal, so that their directions may be any"
    elif calibration == "svc" and found.every_rank(recipe.options):
        reason, hint = "of a dense result only the leading part is known", "use --space knots"
    if reason:
        raise UsageError(f"{name} takes no --calibrate {calibration}: {reason}.", hint)


def parse_size(text: str) -> int:
    """Bytes of '20MB', '5MiB', '300k' or '1000'. Raises UsageError for anything else."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kmg]?)(i?)b?\s*", text.lower())
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or number <= 0:
        raise UsageError(
            f"--size is '{text}'; it must be bytes such as 20MB, 5MiB or 300k.",
            "for example: --size 20MB",
        )
    power = {"": 0, "k": 1, "m": 2, "g": 3}[match[2]]
    return int(number * (1024 if match[3] else 1000) ** power)
