"""What a PEFT adapter is besides plain LoRA: named with the reason why it is not a plain sum."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from msgspec.structs import replace

from loramerge.adapter import Variant
from loramerge.errors import AdapterError
from loramerge.io._grammar import BAKE, DECOMPOSED
from loramerge.io._header import shown

__all__ = ["check_type", "signs", "unknown_fields", "variants"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


INTO_BASE = "merge it into its base model in PEFT: model.merge_and_unload()"
# Types that peft.save_as_lora converts (PEFT 0.21).
CONVERTIBLE = _words(
    "C3A DELORA FOURIERFT GRALORA LOHA LOKR MISS PSOFT RANDLORA TINYLORA UNILORA VBLORA VERA WAVEFT"
)
PROMPTS = _words(
    "ADAPTION_PROMPT CARTRIDGE CPT MULTITASK_PROMPT_TUNING PREFIX_TUNING PROMPT_TUNING P_TUNING"
)
MIXTURES = frozenset(("POLY", "XLORA"))

# Fields that steer training or loading and leave the delta weight alone, or are read elsewhere.
NEUTRAL = _words(
    "alpha_pattern auto_mapping base_model_class base_model_name_or_path bias corda_config "
    "ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode "
    "init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout "
    "lora_ga_config megatron_config megatron_core modules_to_save parent_library peft_type "
    "peft_version qalora_group_size r rank_pattern revision runtime_config target_modules "
    "target_parameters "
    "task_type trainable_token_indices use_rslora"
)
# Field set -> what it makes of the file. None of these is a sum of plain updates.
FIELDS: Mapping[str, Variant] = {
    name: Variant(label, reason, hint)
    for name, label, reason, hint in (
        (
            "use_dora",
            "DoRA",
            DECOMPOSED,
            BAKE,
        ),
        (
            "lora_bias",
            "lora_bias",
            "lora_B carries a bias, which is no part of the delta weight",
            INTO_BASE,
        ),
        ("use_qalora", "QALoRA", "it pools the input before lora_A", INTO_BASE),
        ("use_bdlora", "BD-LoRA", "its factors are stored as blocks of a diagonal", INTO_BASE),
        (
            "arrow_config",
            "Arrow",
            "it chooses among adapters at run time",
            "merge the adapters it chooses from one by one",
        ),
        ("kasa_config", "KaSA", "it has a diagonal between lora_A and lora_B", INTO_BASE),
        ("velora_config", "VeLoRA", "it holds more than lora_A and lora_B", INTO_BASE),
        ("monteclora_config", "MonteCLoRA", "it samples its weights", INTO_BASE),
        (
            "alora_invocation_tokens",
            "aLoRA",
            "it applies only after its invocation tokens, a merged one would not",
            "train it as plain LoRA (alora_invocation_tokens=None)",
        ),
        (
            "layer_replication",
            "layer replication",
            "its layer numbers are those of an enlarged model",
            INTO_BASE,
        ),
    )
}
# What a key alone gives away, where a config is missing or keeps silent: field -> key.
SIGNS = {
    field: re.compile(pattern)
    for field, pattern in (
        ("use_dora", r"\.lora_magnitude_vector(\.|$)"),
        ("lora_bias", r"\.lora_B(\.[^.]+)?\.bias$"),
        ("kasa_config", r"\.lora_diag(\.|$)"),
        ("velora_config", r"\.lora_velora_embed(\.|$)"),
        ("monteclora_config", r"\.lora_monteclora_sampler\."),
    )
}
READ = ("LORA", "ADALORA", "LOHA", "LOKR", "VBLORA", "VERA")
# init_lora_weights that change the base: A and B then stand against W - s A0 B0, not against W.
REBASING = ("pissa", "olora", "corda", "lora_ga")
# Of these, what the base model alone determines.
RECOMPUTED = ("pissa", "olora")


def check_type(config: Mapping[str, Any], where: str) -> None:
    """Raise AdapterError unless the config is that of a LoRA."""
    kind = config.get("peft_type")
    if kind == "LORA":
        return
    if not isinstance(kind, str):
        raise AdapterError(
            f"{where}: its adapter_config.json has no peft_type, so it is none of PEFT's.",
            "name the weights file itself, or save the adapter again with PEFT",
        )
    reason, hint = f"loramerge reads {', '.join(READ)}", INTO_BASE
    if kind in CONVERTIBLE:
        hint = "convert it in PEFT: peft.save_as_lora('converted', model, rank=16)"
    elif kind in PROMPTS:
        reason, hint = "it learns prompts and changes no weight", "nothing of it can be merged"
    elif kind in MIXTURES:
        reason, hint = "it routes between adapters", "merge the adapters it routes between"
    raise AdapterError(f"{where} is a PEFT adapter of type {shown(kind)}: {reason}.", hint)


def signs(key: str) -> list[str]:
    """The config fields a key gives away: what its adapter is besides plain LoRA."""
    return [field for field, pattern in SIGNS.items() if pattern.search(key)]


def variants(config: Mapping[str, Any], keys: Iterable[str]) -> tuple[Variant, ...]:
    """Everything in a config, or in the keys of a file, that is more than plain updates.

    What makes plain LoRA of one alone refuses another: of several, only PEFT does.
    """
    fields = {field for key in keys for field in signs(key)}
    fields |= {field for field in FIELDS if config.get(field)}
    found = [variant for field, variant in FIELDS.items() if field in fields]
    found += _inits(config)
    return tuple(found if len(found) < 2 else [replace(one, hint=INTO_BASE) for one in found])


def _inits(config: Mapping[str, Any]) -> Iterator[Variant]:
    init = config.get("init_lora_weights")
    if not isinstance(init, str):
        return
    if init.lower().startswith(REBASING):
        yield Variant(
            f"{shown(init)} initialisation",
            "its factors stand against a base model that was changed at the start of training",
            "make plain LoRA of it: loramerge convert ADAPTER --to peft --initial BEFORE_TRAINING"
            + (" (or --base MODEL)" if init.lower() in RECOMPUTED else ""),
        )
    elif init.lower() == "loftq":
        yield Variant(
            "LoftQ",
            "its factors also hold the rounding of a quantised base model",
            INTO_BASE,
        )


def unknown_fields(config: Mapping[str, Any]) -> list[str]:
    """Config fields that loramerge does not know and cannot judge, where they are set."""
    return sorted(shown(name) for name, value in config.items() if value and name not in KNOWN)


KNOWN = NEUTRAL | FIELDS.keys()
