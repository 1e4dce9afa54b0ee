"""What adapter_config.json says: the scale of each module, and what is more than plain LoRA."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from loramerge.adapter import Variant
from loramerge.errors import AdapterError, UsageError

__all__ = ["Scale", "check_type", "portable_config", "scale_of", "variants_of"]

# Fields that steer training or loading and leave the delta weight alone.
NEUTRAL = frozenset(
    [
        "auto_mapping",
        "base_model_class",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",
        "loftq_config",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "parent_library",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "base_model_name_or_path",
        "alpha_pattern",
        "rank_pattern",
        "r",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "lora_bias",
        "trainable_token_indices",
    ]
)
# init_lora_weights that change the base: A and B then stand against W - s A0 B0, not against W.
BASE_CHANGING = ("pissa", "olora", "corda", "lora_ga")
NOT_PLAIN = "train it as plain LoRA, or merge it into its base model with PEFT"
# Field set -> what it makes of the file. None of these is a sum of plain updates.
VARIANT_FIELDS: tuple[tuple[str, str, str], ...] = (
    ("use_qalora", "QALoRA", "it pools the input before lora_A"),
    ("use_bdlora", "BD-LoRA", "its factors are block diagonal over shards"),
    ("arrow_config", "Arrow", "it routes between adapters at run time"),
    ("kasa_config", "KaSA", "it has a diagonal between lora_A and lora_B"),
    ("velora_config", "VeLoRA", "it changes the forward pass"),
    ("monteclora_config", "MonteCLoRA", "it samples its weights"),
    ("alora_invocation_tokens", "aLoRA", "it applies only after its invocation tokens"),
    ("layer_replication", "layer replication", "its layer numbers are those of an enlarged model"),
    ("target_parameters", "expert parameters", "lora_A and lora_B hold several experts each"),
)


class Scale:
    """alpha / r of each module, or alpha / sqrt(r) for rsLoRA, patterns included.

    rank_pattern and alpha_pattern are searched as PEFT >= 0.11 does: the first key in file order
    that matches the end of the module path as a regular expression, each dict on its own. The rank
    is that of the tensor, which is what B @ A has.
    """

    def __init__(self, alpha: float, config: Mapping[str, Any]) -> None:
        self.alpha = alpha
        self.rslora = bool(config.get("use_rslora"))
        self.patterns = _compiled(config.get("alpha_pattern") or {}, "alpha_pattern")
        self.rank_patterns = _compiled(config.get("rank_pattern") or {}, "rank_pattern")
        self.rank = config.get("r")

    def of(self, module: str, rank: int) -> float:
        """The factor on B @ A of one module."""
        alpha = _lookup(self.patterns, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def contradicts(self, module: str, rank: int) -> bool:
        """Whether the config states another rank than the tensor has."""
        return self.rank is not None and _lookup(self.rank_patterns, module, self.rank) != rank


class Unit:
    """Scale 1 for every module, where nothing says otherwise."""

    def of(self, module: str, rank: int) -> float:
        """1."""
        return 1.0

    def contradicts(self, module: str, rank: int) -> bool:
        """Nothing is stated, so nothing is contradicted."""
        return False


def scale_of(config: Mapping[str, Any] | None, alpha: float | None) -> Scale | Unit:
    """The scale rule of a config, of a bare --alpha, or 1.

    Raises AdapterError for a config without a usable lora_alpha, UsageError when --alpha
    contradicts it.
    """
    if config is None:
        return Unit() if alpha is None else Scale(alpha, {})
    stated = config.get("lora_alpha", 8)  # PEFT's default
    if isinstance(stated, bool) or not isinstance(stated, int | float) or not math.isfinite(stated):
        raise AdapterError(f"adapter_config.json: lora_alpha is {stated!r}, not a number.")
    if alpha is not None and alpha != stated:
        raise UsageError(
            f"--alpha {alpha:g} contradicts the adapter's own config, which says {stated:g}.",
            "leave --alpha out, or edit lora_alpha in adapter_config.json",
        )
    return Scale(float(stated), config)


def _compiled(patterns: Any, field: str) -> list[tuple[re.Pattern[str], float]]:
    if not isinstance(patterns, dict):
        raise AdapterError(f"adapter_config.json: {field} is not an object.")
    found = []
    for pattern, value in patterns.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise AdapterError(f"adapter_config.json: {field}['{pattern}'] is not a number.")
        if len(pattern) > 1024 or re.search(r"[*+}]\)?[*+{]", pattern):
            raise AdapterError(
                f"adapter_config.json: {field} has an unsafe pattern '{pattern:.60}'."
            )
        try:
            found.append((re.compile(rf"(.*\.)?({pattern})$"), float(value)))
        except re.error as error:
            raise AdapterError(
                f"adapter_config.json: {field} has an invalid pattern '{pattern:.60}': {error}."
            ) from None
    return found


def _lookup(patterns: list[tuple[re.Pattern[str], float]], module: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(module)), default)


def check_type(config: Mapping[str, Any], where: str) -> None:
    """Raise AdapterError unless the config is that of a LoRA."""
    kind = config.get("peft_type")
    if kind is None:
        raise AdapterError(f"{where} has no peft_type: it is no PEFT adapter config.")
    if kind != "LORA":
        raise AdapterError(
            f"{where} is a PEFT adapter of type {kind}; loramerge reads type LORA.",
            "convert it with peft.convert_to_lora, or merge it into its base model with PEFT",
        )


def variants_of(config: Mapping[str, Any]) -> Iterable[Variant]:
    """Everything in a config that makes the file more than a sum of plain updates."""
    for name, variant, reason in VARIANT_FIELDS:
        if config.get(name):
            yield Variant(variant, reason, NOT_PLAIN)
    if config.get("use_dora"):
        yield DORA
    if config.get("lora_bias"):
        yield LORA_BIAS
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING):
        yield Variant(
            f"{init} initialisation",
            "its factors stand against a base model that was changed at the start of training",
            "save it again in PEFT with path_initial_model_for_weight_conversion",
        )


DORA = Variant(
    "DoRA",
    "its magnitudes act on the sum of base weight and update, which needs the base model",
    "merge it into its base model with PEFT, and extract a LoRA from the result",
)
LORA_BIAS = Variant(
    "lora_bias",
    "lora_B carries a bias, which is no part of the delta weight",
    "train it with lora_bias=False",
)


def unknown_fields(config: Mapping[str, Any]) -> list[str]:
    """Config fields that loramerge does not know and cannot judge, where they are set."""
    known = NEUTRAL | {name for name, _, _ in VARIANT_FIELDS}
    return sorted(name for name, value in config.items() if name not in known and value)


def portable_config(
    *, rank: int, modules: list[str], patterns: Mapping[str, int], sources: list[Mapping[str, Any]]
) -> dict[str, Any]:
    """The config that means the same in every consumer: scale 1, one rank unless `patterns`.

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
        "lora_alpha": rank,
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
