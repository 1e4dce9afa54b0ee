"""A recipe: which method, on which adapters, with which values. One declaration for every way in.

The command line, Python and YAML all end here, with flat names: a method's own options and the
settings every computing command shares.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from loramerge.errors import UsageError
from loramerge.linalg.ranks import Allocation, Criterion
from loramerge.linalg.scales import ScaleName
from loramerge.options import Count, Factor, Option, Options, Share, build, describe
from loramerge.registry import Method, Preset, method, methods

__all__ = ["MergeSettings", "Named", "Recipe", "Settings", "find", "make_recipe", "options_of"]


class Settings(Options, frozen=True):
    """What every computing command takes."""

    rank: Annotated[
        Count | Literal["max", "full"] | None,
        Meta(
            description="Output rank: a number, max (the largest input rank) or full (lossless).",
            extra={"short": "-r"},
        ),
    ] = None
    energy: Annotated[
        Share | None, Meta(description="Keep this share of the squared singular values.")
    ] = None
    max_error: Annotated[
        Share | None,
        Meta(description="Largest relative Frobenius error of any module; exit 3 if out of reach."),
    ] = None
    size: Annotated[
        str | None, Meta(description="Largest file to write, such as 20MB or 5MiB.")
    ] = None
    allocate: Annotated[
        Allocation | None,
        Meta(
            description="Spread ranks over modules by score per parameter: relative (s/|dW|)^2 is "
            "the safest, sigma s, energy s^2; uniform: one rank for all."
        ),
    ] = None
    layout: Annotated[
        Literal["uniform", "pattern"] | None,
        Meta(
            description="uniform: one stored rank, zero-padded, right in every consumer. "
            "pattern: a rank per module, smaller. Default: uniform, or pattern where ranks are "
            "chosen per module."
        ),
    ] = None
    include: Annotated[
        tuple[str, ...], Meta(description="Only modules whose name matches this glob.")
    ] = ()
    exclude: Annotated[
        tuple[str, ...], Meta(description="Leave out modules whose name matches this glob.")
    ] = ()
    to: Annotated[
        str, Meta(description="Layout to write: same, or one of `loramerge layouts`.")
    ] = "same"
    save_dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"],
        Meta(description="Stored dtype; auto is the inputs' common one."),
    ] = "auto"
    compute_dtype: Annotated[
        Literal["float32", "float64"], Meta(description="Dtype of the factors while computing.")
    ] = "float32"
    device: Annotated[
        str,
        Meta(description="auto, cpu, cuda[:N] or mps.", pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$"),
    ] = "auto"
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1, description="Seed of everything random.")] = 0


class MergeSettings(Settings, frozen=True):
    """What merge commands take besides."""

    lambda_: Annotated[float, Meta(description="Factor on the merged update.")] = 1.0
    scale: Annotated[
        Factor | ScaleName | None,
        Meta(
            description="Length of the result: paper (as published), auto (label-free rule), norm "
            "(mean norm of the inputs), ls (nearest to the weighted sum), or a factor."
        ),
    ] = None
    missing: Annotated[
        Literal["zero", "skip", "error"],
        Meta(
            description="A module absent from an adapter contributes nothing (zero), is left "
            "out of the result (skip), or stops the merge (error)."
        ),
    ] = "zero"
    extras: Annotated[
        Literal["error", "first", "drop"],
        Meta(
            description="Saved heads, biases, embeddings beside the LoRA: stop, take the first "
            "adapter's, or leave them out."
        ),
    ] = "error"
    base_mismatch: Annotated[
        Literal["warn", "error", "ignore"],
        Meta(description="Adapters that name different base models."),
    ] = "warn"


@dataclass(frozen=True, slots=True)
class Named:
    """One input as the user named it: reference, weight, and --alpha where one was given."""

    reference: str
    weight: float = 1.0
    alpha: float | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """A checked recipe: every value of the right type and in range."""

    method: Method
    adapters: tuple[Named, ...]
    options: Options
    settings: Settings

    @property
    def merge(self) -> MergeSettings:
        """The settings of a merge; for a compressor their defaults."""
        return self.settings if isinstance(self.settings, MergeSettings) else MergeSettings()

    @property
    def scale(self) -> float | ScaleName:
        """--scale as asked for, or the method's own default."""
        return self.merge.scale if self.merge.scale is not None else self.method.scale

    @property
    def criterion(self) -> Criterion | None:
        """What bounds the ranks, where it is more than a rank known from the headers."""
        s = self.settings
        if s.size is not None:
            return Criterion(size=parse_size(s.size))
        if s.energy is not None or s.max_error is not None:
            return Criterion(energy=s.energy, max_error=s.max_error)
        if isinstance(s.rank, int) and s.allocate not in (None, "uniform"):
            return Criterion(rank=s.rank)
        return None

    def canonical(self) -> dict[str, Any]:
        """Everything that decides the result, defaults included, without paths or outputs."""
        settings = msgspec.to_builtins(self.settings)
        return {
            "method": self.method.name,
            "weights": [named.weight for named in self.adapters],
            "options": msgspec.to_builtins(self.options),
            "settings": {name: value for name, value in settings.items() if name != "device"},
        }


def find(name: str) -> tuple[Method, Preset | None]:
    """A method by its name or by the name of one of its presets."""
    for found in methods().values():
        for preset in found.presets:
            if preset.name == name:
                return found, preset
    return method(name), None


def options_of(found: Method) -> list[Option]:
    """Everything one command takes: the method's own options, then the shared settings."""
    return describe(found.options) + describe(_settings(found))


def _settings(found: Method) -> type[Settings]:
    return MergeSettings if found.takes == "many" else Settings


def make_recipe(name: str, adapters: Sequence[Named], values: Mapping[str, object]) -> Recipe:
    """Check flat values against the method's declarations.

    Raises UsageError that names the option, the bad value and the allowed range.
    """
    found, preset = find(name)
    values = {**(preset.values if preset else {}), **values}
    own = {option.name for option in describe(found.options)}
    shared = {option.name for option in describe(_settings(found))}
    options = {key: value for key, value in values.items() if key in own or key not in shared}
    settings = {key: value for key, value in values.items() if key in shared and key not in own}
    recipe = Recipe(
        method=found,
        adapters=tuple(adapters),
        options=build(found.options, options, name, also=shared),
        settings=build(_settings(found), settings, name),
    )
    _check(recipe, name)
    return recipe


def _check(recipe: Recipe, name: str) -> None:
    s = recipe.settings
    bounds = {"rank": s.rank, "energy": s.energy, "max_error": s.max_error, "size": s.size}
    given = ["--" + key.replace("_", "-") for key, value in bounds.items() if value is not None]
    if recipe.method.takes == "one":
        if len(recipe.adapters) != 1:
            raise UsageError(f"{name} takes one adapter, not {len(recipe.adapters)}.")
        if not given:
            raise UsageError(
                f"{name} needs to know how small: --rank, --energy, --max-error or --size.",
                f"for example: {recipe.method.example}",
            )
    elif not recipe.adapters:
        raise UsageError(f"{name} needs adapters.", f"for example: {recipe.method.example}")
    if len(given) > 1:
        raise UsageError(f"{name} takes only one of {' and '.join(given)}.")
    if s.allocate is not None and (not given or isinstance(s.rank, str)):
        raise UsageError(f"{name}: --allocate needs --rank N, --energy, --max-error or --size.")
    if s.size is not None:
        parse_size(s.size)


def parse_size(text: str) -> int:
    """Bytes of '20MB', '5MiB', '300k' or '1000'. Raises UsageError for anything else."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kmg]?)(i?)b?\s*", text.lower())
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or number <= 0:
        raise UsageError(f"--size is '{text}'; it must be bytes such as 20MB, 5MiB or 300k.")
    power = {"": 0, "k": 1, "m": 2, "g": 3}[match[2]]
    return int(number * (1024 if match[3] else 1000) ** power)
