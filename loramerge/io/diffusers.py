"""diffusers: <component>.<path> and a pair in any of five spellings; scale 1 unless it says so."""

import json
import re
from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from loramerge.adapter import Adapter, Module
from loramerge.errors import AdapterError, listed
from loramerge.io._grammar import Grammar, dora, scaled
from loramerge.io._layout import Draft, Given, Layout, Written, alpha_of
from loramerge.io._peft_config import header_facts, pattern, portable_config, rank_pattern, scale_of
from loramerge.io._peft_kinds import variants
from loramerge.io._pipeline import (
    BUNDLED,
    COMPONENT,
    ORIGINAL,
    agreed,
    bundled,
    carried,
    own_scale,
    pairs,
)
from loramerge.io._source import Source

NAME = rf"(?P<module>(?!{ORIGINAL}){COMPONENT}.+?)"
# The oldest files leave the name of the only component out.
UNET = r"(?=(?:down|up)_blocks\.\d+\.|mid_block\.)"
OLD = rf"(?P<module>(?:(?!{ORIGINAL}){COMPONENT}|{UNET}).+?"


def _spellings(letter: str, side: str) -> tuple[re.Pattern[str], ...]:
    return (
        re.compile(rf"{NAME}\.lora_{letter}(?:(?:\.[^.]+)?\.weight)?"),
        re.compile(rf"{NAME}\.lora_{side}\.weight"),
        re.compile(rf"{OLD})(?:_lora|\.lora|\.lora_linear_layer)\.{side}\.weight"),
        re.compile(rf"{OLD}\.to_(?:q|k|v|out\.0))\.{side}(?:\.weight)?"),
    )


GRAMMAR = Grammar(
    (
        *(("A", pattern) for pattern in _spellings("A", "down")),
        *(("B", pattern) for pattern in _spellings("B", "up")),
        ("alpha", re.compile(rf"{NAME}(?:\.lora)?\.alpha")),
        ("magnitude", re.compile(rf"{NAME}\.lora_magnitude_vector(?:\.weight)?")),
        ("dora_scale", re.compile(rf"{NAME}\.dora_scale")),
        ("bias", re.compile(rf"{NAME}\.lora_B(?:\.[^.]+)?\.bias")),
    )
)
HEADER = "lora_adapter_metadata"


def explains(key: str) -> bool:
    """Pairs below the name of a component, and those of a UNet alone in the oldest spellings."""
    return GRAMMAR.parse(key) is not None or key.startswith(BUNDLED)


def read(given: Given) -> Adapter:
    """Describe a file: the scale is its alpha tensors', or its header's, or 1, each by component.

    Names are those of today: a processor's to_out is to_out.0, a text encoder's to_q is q_proj.
    """
    source, where = given.source, given.reference
    own_scale(given)
    groups = _groups(source, where)
    modules, silent = scaled(source, groups, where)
    stated = header_facts(given) or {}
    configs = _by_component(stated)
    notes = []
    if silent < len(modules):
        if configs:
            raise AdapterError(
                f"{where} states its scale twice, in alpha tensors and in {HEADER}.",
                "remove one of them: diffusers takes neither then",
            )
        if silent:
            notes.append(f"scale 1 where alpha is missing: {silent} of {len(modules)} modules")
    modules, wrong = _scaled_by_header(modules, configs)
    if wrong:
        notes.append(
            f"{HEADER} states another rank than the tensors of {listed(wrong, 3)}; the tensors' "
            "rank is used"
        )
    merged = {name: value for config in configs.values() for name, value in config.items() if value}
    base = merged.get("base_model_name_or_path")
    return Adapter(
        reference=where,
        layout="diffusers",
        modules=modules,
        source=source,
        naming="diffusers",
        extras=bundled(source),
        variants=(*variants(merged, source.tensors), *dora(groups, "dora_scale")),
        metadata=source.metadata,
        base_model=base if isinstance(base, str) else None,
        assumed=tuple(notes),
    )


def _groups(source: Source, where: str) -> dict[str, dict[str, str]]:
    """Keys by the module's name of today, and role."""
    groups: dict[str, dict[str, str]] = {}
    for stored, roles in GRAMMAR.group(source.tensors).items():
        name = _today(stored)
        if name in groups:
            twice = listed([*groups[name].values(), *roles.values()], 4)
            raise AdapterError(f"{where} holds {name} twice: {twice}.", "remove one of them")
        groups[name] = roles
    return groups


def _today(name: str) -> str:
    """The path of a module in the model itself."""
    if not re.match(COMPONENT, name):
        name = f"unet.{name}"
    if name.startswith("text_encoder"):
        return re.sub(r"(?<=\.self_attn\.)to_(q|k|v|out)$", r"\1_proj", name)
    path, processor, leaf = name.rpartition(".processor.")
    if not processor:
        return name
    return f"{path}.to_out.0" if leaf == "to_out" else f"{path}.{leaf}"


def _by_component(stated: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A header's fields, <component>.<field>, as a config for each component."""
    configs: dict[str, dict[str, Any]] = {}
    for key, value in stated.items():
        component, dot, name = key.partition(".")
        if dot:
            configs.setdefault(component, {})[name] = value
    return configs


def _scaled_by_header(
    modules: Mapping[str, Module], configs: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Module], list[str]]:
    """Modules with the scale their component's config says, and those whose rank it denies."""
    try:
        scales = {component: scale_of(config, None) for component, config in configs.items()}
    except AdapterError as error:
        message = error.message.replace("adapter_config.json", HEADER)
        raise AdapterError(message, "save the adapter again") from None
    found, wrong = {}, []
    for name, module in modules.items():
        component, _, path = name.partition(".")
        found[name] = module
        if scale := scales.get(component):
            found[name] = replace(module, scaling=scale.of(path, module.rank))
            wrong += [name] if scale.contradicts(path, module.rank) else []
    return found, wrong


def write(draft: Draft) -> Written:
    """PEFT-style pairs; the header says the alpha of each module, its rank in a merge."""
    tensors = (*pairs(draft, "lora_A.weight", "lora_B.weight"), *carried(draft))
    # Sorted, but not inside: the order of a rank_pattern has a meaning.
    header = json.dumps(dict(sorted(_header(draft).items())), separators=(",", ":"))
    return Written(tensors, {"format": "pt", **agreed(draft), HEADER: header})


def _header(draft: Draft) -> dict[str, Any]:
    """A config for each component, its fields as <component>.<field>.

    Text encoders of newer transformers have no `text_model`: the end of a path fits both.
    """
    components: dict[str, list[Module]] = {}
    for module in draft.modules:
        component, _, path = module.name.partition(".")
        path = path.removeprefix("text_model.")
        components.setdefault(component, []).append(replace(module, name=path))
    header: dict[str, Any] = {}
    for component, modules in components.items():
        ranks = rank_pattern(modules, draft.rank)
        names = [module.name for module in modules]
        config = portable_config(
            rank=draft.rank, alpha=draft.alpha, modules=names, patterns=ranks, sources=[]
        )
        alphas = {module.name: alpha_of(module) for module in modules}
        config["alpha_pattern"] = pattern(alphas, draft.alpha)
        header |= {f"{component}.{name}": value for name, value in config.items()}
    return header


LAYOUT = Layout(
    name="diffusers",
    summary="diffusers: one file for a pipeline, every spelling since LoRA processors.",
    directory=True,
    explains=explains,
    read=read,
    write=write,
    naming="diffusers",
    unscaled=True,
    scale="alphas",
    weights="pytorch_lora_weights.safetensors",
)
