"""What adapter_config.json says of the scale of each module, and the config of a result."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from msgspec import Struct

from loramerge.adapter import Module
from loramerge.errors import AdapterError, UsageError
from loramerge.io._header import shown
from loramerge.io._layout import Given

__all__ = [
    "Facts",
    "Scale",
    "facts",
    "header_facts",
    "pattern",
    "portable_config",
    "rank_pattern",
    "scale_of",
    "tails",
]

Number = TypeVar("Number", int, float)

DEFAULT_RANK = DEFAULT_ALPHA = 8  # PEFT's, where a config leaves them out
EDIT = "correct adapter_config.json, or save the adapter again"
# A pattern comes from a stranger's file: no group may repeat, and few things may at all, or
# matching a long name could take for ever.
UNSAFE = re.compile(r"\)[*+{]")
MAX_REPEATS = 4
MAX_PATTERN = 1024


class Scale:
    """alpha / r of each module, or alpha / sqrt(r) for rsLoRA, patterns included.

    rank_pattern and alpha_pattern are searched as PEFT >= 0.11 does: the first key in file order
    that matches the end of the module path as a regular expression, else the key that is the path
    itself, each dict on its own. The rank is that of the tensor, which is what B @ A has.
    """

    def __init__(self, alpha: float, config: Mapping[str, Any]) -> None:
        self.alpha = alpha
        self.rslora = bool(config.get("use_rslora"))
        self.alphas = Patterns(config, "alpha_pattern")
        self.ranks = Patterns(config, "rank_pattern")
        self.rank = config.get("r", DEFAULT_RANK if config else None)

    def of(self, module: str, rank: int) -> float:
        """The factor on B @ A of one module."""
        return self.alphas.get(module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)

    def contradicts(self, module: str, rank: int) -> bool:
        """Whether the config states another rank than the tensor has."""
        return self.rank is not None and self.ranks.get(module, self.rank) != rank


class Patterns:
    """A rank_pattern or alpha_pattern: values by regular expressions for the end of a path.

    Raises AdapterError for what is none, or could take for ever to match.
    """

    def __init__(self, config: Mapping[str, Any], field: str) -> None:
        self.literal = config.get(field) or {}
        if not isinstance(self.literal, dict):
            raise AdapterError(f"adapter_config.json: {field} is not an object.", EDIT)
        for pattern, value in self.literal.items():
            if not _is_number(value):
                raise AdapterError(
                    f"adapter_config.json: {field}['{shown(pattern)}'] is not a number.", EDIT
                )
        self.searched = [(_compiled(p, field), v) for p, v in self.literal.items()]

    def get(self, module: str, default: float) -> float:
        """The value for a module path."""
        for pattern, value in self.searched:
            if pattern.match(module):
                return float(value)
        return float(self.literal.get(module, default))


def _compiled(pattern: str, field: str) -> re.Pattern[str]:
    repeats = len(re.findall(r"[*+]|\{\d*,", pattern))
    if len(pattern) > MAX_PATTERN or repeats > MAX_REPEATS or UNSAFE.search(pattern):
        raise AdapterError(
            f"adapter_config.json: {field} has a pattern that could take for ever to match: "
            f"'{shown(pattern)}'.",
            "write the full module paths instead",
        )
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterError(
            f"adapter_config.json: {field} has an invalid pattern '{shown(pattern)}': {error}.",
            EDIT,
        ) from None


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)


def scale_of(config: Mapping[str, Any], alpha: float | None) -> Scale:
    """The scale rule of a config, or that of a bare --alpha where the config says nothing.

    Raises AdapterError for a lora_alpha that is no number, UsageError when --alpha contradicts it.
    """
    stated = config.get("lora_alpha", alpha if alpha is not None else DEFAULT_ALPHA)
    if not _is_number(stated):
        raise AdapterError(
            f"adapter_config.json: lora_alpha is {shown(repr(stated))}, not a number.", EDIT
        )
    if alpha is not None and alpha != stated:
        raise UsageError(
            f"--alpha {alpha:g} contradicts the adapter's own config, which says {stated:g}.",
            "leave --alpha out, or edit lora_alpha in adapter_config.json",
        )
    return Scale(float(stated), config)


class Facts(Struct, frozen=True):
    """The config that speaks for a file, None where nothing does, and what had to be assumed."""

    config: Mapping[str, Any] | None
    notes: tuple[str, ...] = ()


def facts(given: Given, modules: Iterable[Module]) -> Facts:
    """What says the scale of a file: its own config, its header, a config beside it, or nothing.

    Raises AdapterError for a header that holds something else than facts.
    """
    embedded = header_facts(given)
    if embedded is not None and "lora_alpha" not in embedded:
        embedded = None
    config = given.config
    if config is not None and not given.beside:
        if embedded and embedded["lora_alpha"] != config.get("lora_alpha", DEFAULT_ALPHA):
            return Facts(
                config, ("its header says another lora_alpha; adapter_config.json counts",)
            )
        return Facts(config)
    if embedded is not None:
        return Facts({"peft_type": "LORA", **embedded})
    if config is None or _is_about(config, modules):
        return Facts(config)
    return Facts(None, ("the adapter_config.json beside it is about another file",))


def header_facts(given: Given) -> dict[str, Any] | None:
    """What a file's header says of its adapter, None where it says nothing.

    Raises AdapterError for a lora_adapter_metadata that holds something else than facts.
    """
    text = given.source.metadata.get("lora_adapter_metadata")
    if text is None:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise AdapterError(
            f"{given.reference}: lora_adapter_metadata in its header is not a JSON object.",
            "save the adapter again with the tool that made it",
        )
    return found


def _is_about(config: Mapping[str, Any], modules: Iterable[Module]) -> bool:
    """Whether a config states the ranks and the targets of these modules."""
    if config.get("peft_type") != "LORA":
        return False
    scale, targets = scale_of(config, None), config.get("target_modules")
    return not any(
        scale.contradicts(module.name, module.rank)
        or (isinstance(targets, list) and not any(t in targets for t in tails(module.name)))
        for module in modules
    )


def tails(path: str) -> list[str]:
    """A module path and every shorter path it ends in: what PEFT matches names against."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def portable_config(
    *,
    rank: int,
    alpha: float,
    modules: list[str],
    patterns: Mapping[str, int],
    sources: list[Mapping[str, Any]],
) -> dict[str, Any]:
    """The config that means the same in every consumer: one alpha, one rank unless `patterns`.

    Only facts on which all sources agree are passed on; training settings are not.
    """
    agreed = {
        name: sources[0][name]
        for name in ("base_model_name_or_path", "task_type", "revision", "fan_in_fan_out")
        if sources
        and all(source.get(name) == sources[0].get(name) for source in sources)
        and sources[0].get(name) is not None
    }
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": dict(patterns),
        "target_modules": sorted(modules),
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
        **agreed,
    }


def rank_pattern(modules: Sequence[Module], rank: int) -> dict[str, int]:
    """The `pattern` of ranks."""
    return pattern({module.name: module.rank for module in modules}, rank)


def pattern(values: Mapping[str, Number], default: Number) -> dict[str, Number]:
    """Values by full path where they are not `default`, or a shorter path would catch a module.

    A pattern is a regular expression for the end of a path; the first that matches counts. So
    longer paths come first, of equal ones that with fewer dots (each matches any character), and
    `block.lin` is named, even if its rank is `rank`, where `lin` is.
    """
    own = {name for name, value in values.items() if value != default}
    named = [name for name in values if not own.isdisjoint(tails(name))]
    named.sort(key=lambda name: (-len(name), name.count("."), name))
    plain = re.compile(r"[\w.-]+")
    return {n if plain.fullmatch(n) else re.escape(n): values[n] for n in named}
