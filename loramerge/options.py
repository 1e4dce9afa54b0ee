"""Options declared once: flags, recipe keys, docs rows and contract tests are read off them."""

import math
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_args, get_origin

import msgspec
from msgspec import Struct, field

from loramerge.errors import UsageError

__all__ = [
    "Count",
    "Factor",
    "Option",
    "OptionError",
    "Options",
    "Ratio",
    "Share",
    "build",
    "describe",
    "did_you_mean",
    "read_value",
]


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every options declaration: immutable, keyword-only, unknown names refused."""

    @property
    def needs_rank(self) -> str | None:
        """The option that works only with a rank known from the headers, where it is set."""
        return None

    @property
    def bound(self) -> str | None:
        """The option that bounds the rank of the result, as --rank would, where it is set."""
        return None

    def rank_below(self, highest: int) -> int | None:
        """The rank that option gives an input whose largest is `highest`."""
        return None

    @property
    def trains_on(self) -> bool:
        """Whether the result is to be trained further: no rank of it may be dead."""
        return False


class OptionError(UsageError):
    """An option that there is not, or whose value is refused; `text` says why without its name."""

    def __init__(self, message: str, hint: str, name: str, text: str) -> None:
        super().__init__(message, hint)
        self.name = name
        self.text = text


# Bounded numbers, for options that may also be None or a word.
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=1)]
Factor: TypeAlias = Annotated[float, msgspec.Meta(gt=0)]
Ratio: TypeAlias = Annotated[float, msgspec.Meta(gt=1)]
Share: TypeAlias = Annotated[float, msgspec.Meta(gt=0, le=1)]

AnyOptions = TypeVar("AnyOptions", bound=Options)
SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
METAVARS: Mapping[type, str] = {int: "N", float: "X"}


class Option(Struct, frozen=True):
    """One declared option: everything a flag, a docs row or a bad value in a test needs.

    What a type cannot say stands in `Meta(extra=...)`: `short` flag, `group` it is listed under
    (none: a method's own), `metavar` and, in words, what is `expected`.
    """

    name: str
    type: type
    default: Any
    description: str
    choices: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    repeated: bool = False
    bounds: Mapping[str, float] = field(default_factory=dict)
    short: str | None = None
    group: str = ""
    metavar: str = "TEXT"
    expected: str = "text"

    @property
    def flag(self) -> str:
        """The long flag: the name with dashes; one-letter names stay short."""
        return (
            f"-{self.name}"
            if len(self.name) == 1
            else "--" + self.name.strip("_").replace("_", "-")
        )

    @property
    def key(self) -> str:
        """The name in recipes: lambda, where Python must say lambda_."""
        return self.name.strip("_")

    @property
    def values(self) -> str:
        """What stands for the value in help: N, X, TEXT, and every word it may be."""
        if self.type is bool:
            return ""
        return "|".join(self.choices or (self.metavar, *self.words))

    @property
    def limits(self) -> str:
        """The bounds as a formula: N >= 1, 0 < X <= 1; nothing where there are none."""
        if len(self.bounds) == 2:
            (low, least), (high, most) = self.bounds.items()
            below = "<=" if low == "ge" else "<"
            return f"{least:.10g} {below} {self.metavar} {SIGNS[high]} {most:.10g}"
        return "".join(f"{self.metavar} {SIGNS[key]} {v:.10g}" for key, v in self.bounds.items())

    @property
    def range(self) -> str:
        """The allowed values in words, for errors."""
        kind = {int: "a whole number", float: "a number", bool: "true or false"}.get(
            self.type, self.expected
        )
        bounds = " and ".join(f"{SIGNS[key]} {v:.10g}" for key, v in self.bounds.items())
        *most, last = self.choices or (f"{kind} {bounds}".rstrip(), *self.words)
        return f"{', '.join(most)} or {last}" if most else last


def describe(options: type[Options]) -> list[Option]:
    """Every option of a declaration, in its order."""
    hints = typing.get_type_hints(options, include_extras=True)
    defaults = {field.name: field.default for field in msgspec.structs.fields(options)}
    return [_option(name, hints[name], defaults[name]) for name in options.__struct_fields__]


def _option(name: str, hint: Any, default: Any) -> Option:
    metas = [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, msgspec.Meta)]
    found = _parts(hint)
    bounds = {
        key: value
        for source in found.metas
        for key in SIGNS
        if (value := getattr(source, key, None)) is not None
    }
    extra = {key: value for meta in metas for key, value in (meta.extra or {}).items()}
    return Option(
        name=name,
        type=next(iter(found.plain), str),
        default=default,
        description=next((meta.description for meta in metas if meta.description), ""),
        choices=found.words if not found.plain else (),
        words=found.words if found.plain else (),
        repeated=found.repeated,
        bounds=bounds,
        **{"metavar": METAVARS.get(next(iter(found.plain), str), "TEXT"), **extra},
    )


class _Parts(Struct):
    plain: list[type]
    words: tuple[str, ...]
    metas: list[msgspec.Meta]
    repeated: bool


def _parts(hint: Any) -> _Parts:
    """Take a type hint apart: plain types, literal words, nested bounds, list or not."""
    origin = get_origin(hint)
    if origin is typing.Annotated:
        inner = _parts(get_args(hint)[0])
        inner.metas += [m for m in hint.__metadata__ if isinstance(m, msgspec.Meta)]
        return inner
    if origin in (types.UnionType, typing.Union):
        parts = [_parts(arg) for arg in get_args(hint) if arg is not types.NoneType]
        return _Parts(
            [t for p in parts for t in p.plain],
            tuple(w for p in parts for w in p.words),
            [m for p in parts for m in p.metas],
            any(p.repeated for p in parts),
        )
    if origin is Literal:
        return _Parts([], tuple(str(word) for word in get_args(hint)), [], False)
    if origin is tuple:
        inner = _parts(get_args(hint)[0])
        inner.repeated = True
        return inner
    return _Parts([hint], (), [], False)


def build(
    options: type[AnyOptions],
    values: Mapping[str, object],
    where: str,
    also: typing.Collection[str] = (),
) -> AnyOptions:
    """Check values against a declaration; `where` names the command in the error.

    `also` are further names the command knows, for the did-you-mean.

    Raises UsageError that names the option, the bad value and the allowed range.
    """
    known = {option.name: option for option in describe(options)}
    for name in values:
        if name not in known:
            close = did_you_mean(name, [*known, *also])
            raise OptionError(
                f"{where} has no option '{name}'.",
                f"did you mean '{close}'?" if close else f"see: loramerge {where} --help",
                name,
                f"is no option of {where}",
            )
    try:
        built = msgspec.convert(dict(values), type=options)
    except msgspec.ValidationError as error:
        path = str(error).rpartition("`$.")[2].split("`")[0].split("[")[0]
        if path not in known:
            raise UsageError(f"{where}: {error}.") from None
        raise _refused(where, known[path], values[path]) from None
    for name in values:
        if isinstance(value := getattr(built, name), float) and not math.isfinite(value):
            raise _refused(where, known[name], value)
    return built


def _refused(where: str, option: Option, value: object) -> OptionError:
    close = did_you_mean(str(value), [*option.choices, *option.words])
    text = f"is {value!r}; it must be {option.range}"
    return OptionError(
        f"{where}: {option.flag} {text}.",
        f"did you mean '{close}'?" if close else f"see: loramerge {where} --help",
        option.name,
        text,
    )


def read_value(option: Option, text: str) -> object:
    """A number, true or false where the option takes one and the text is one, else the text."""
    if text in option.words:
        return text
    if option.type is bool:
        return {"true": True, "false": False}.get(text, text)
    for kind in (int, float):
        try:
            return kind(text) if option.type in (int, float) else text
        except ValueError:
            continue
    return text


def did_you_mean(name: str, known: typing.Iterable[str]) -> str | None:
    """The closest known name, if one is close."""
    import difflib

    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)
