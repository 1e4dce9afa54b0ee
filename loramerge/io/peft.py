"""PEFT: lora_A [r, in] and lora_B [out, r] under base_model.model., beside adapter_config.json."""

import json
import re
from collections.abc import Mapping
from typing import Any

from loramerge.adapter import Adapter, Extra, Module, TensorInfo, Variant
from loramerge.errors import AdapterError, listed
from loramerge.io._grammar import Grammar, check_pairs, pair_shape
from loramerge.io._layout import Draft, Given, Layout, Stored, Written
from loramerge.io._peft_config import (
    DORA,
    LORA_BIAS,
    check_type,
    portable_config,
    scale_of,
    unknown_fields,
    variants_of,
)

PREFIX = "base_model.model."
# What wrappers of the training loop leave in a path; PEFT itself would then load nothing.
WRAPPERS = re.compile(
    r"(^|\.)(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)"
)
NAME = r"(?P<module>.+?)"
GRAMMAR = Grammar(
    (
        ("A", re.compile(NAME + r"\.lora_A(\.[^.]+)?\.weight")),
        ("B", re.compile(NAME + r"\.lora_B(\.[^.]+)?\.weight")),
        ("embedding_A", re.compile(NAME + r"\.lora_embedding_A(\.[^.]+)?")),
        ("embedding_B", re.compile(NAME + r"\.lora_embedding_B(\.[^.]+)?")),
        ("magnitude", re.compile(NAME + r"\.lora_magnitude_vector(\.[^.]+)?")),
        ("lora_bias", re.compile(NAME + r"\.lora_B(\.[^.]+)?\.bias")),
    )
)
ADAPTER_NAME = re.compile(
    r"\.lora_(?:embedding_)?[AB]\.(?!weight$|bias$)(?P<name>[^.]+?)(?:\.(?:weight|bias))?$"
)
# Tensors beside the factors, by the end of their key: what they are to PEFT.
EXTRAS = (
    ("token rows", ".token_adapter.trainable_tokens_delta"),
    ("bias", ".bias"),
    ("saved module", ""),
)


def explains(key: str) -> bool:
    """LoRA keys of any PEFT spelling, and whatever else stands under base_model.model."""
    return GRAMMAR.parse(key) is not None or key.startswith(PREFIX)


def read(given: Given) -> Adapter:
    """Describe a PEFT file. Raises AdapterError for one that no plain LoRA explains."""
    where = given.reference
    config = _facts(given)
    assumed: list[str] = []
    if config is not None:
        check_type(config, where)
    scale = scale_of(config, given.alpha)
    groups = GRAMMAR.group(given.source.tensors)
    _check_one_adapter(given, where)
    for a, b in (("A", "B"), ("embedding_A", "embedding_B")):
        check_pairs(groups, a, b, where)
    modules: dict[str, Module] = {}
    contradicted: list[str] = []
    for stored, roles in groups.items():
        if "A" not in roles and "embedding_A" not in roles:
            continue
        module = _module(_clean(stored), roles, given.source.tensors, scale.of)
        if module.name in modules:
            raise AdapterError(f"{where} holds {module.name} twice, once inside a wrapper.")
        modules[module.name] = module
        if scale.contradicts(module.name, module.rank):
            contradicted.append(module.name)
    if not modules:
        raise AdapterError(f"{where} holds no lora_A and lora_B tensors.", "see: loramerge layouts")
    if contradicted:
        assumed.append(
            f"the config states another rank than the tensors of {listed(contradicted, 3)}; "
            "the tensors' rank is used"
        )
    if config and (unknown := unknown_fields(config)):
        assumed.append(f"config fields unknown to loramerge are left out: {listed(unknown)}")
    unscaled = config is None and given.alpha is None
    if unscaled:
        assumed.append("scale 1: the file does not say its alpha (--alpha N sets it)")
    return Adapter(
        reference=given.reference,
        layout="peft",
        modules=modules,
        source=given.source,
        extras=_extras(given),
        variants=_variants(config or {}, groups),
        config=config or {},
        metadata=given.metadata,
        base_model=(config or {}).get("base_model_name_or_path"),
        assumed=tuple(assumed),
        scale_assumed=unscaled,
    )


def _facts(given: Given) -> Mapping[str, Any] | None:
    """The config beside the file, or the one a bare file carries in its own header."""
    embedded = given.metadata.get("lora_adapter_metadata")
    if given.config is not None or embedded is None:
        return given.config
    try:
        facts = json.loads(embedded)
    except ValueError:
        facts = None
    if not isinstance(facts, dict):
        raise AdapterError(f"{given.reference}: lora_adapter_metadata is not a JSON object.")
    return {"peft_type": "LORA", **facts}


def _check_one_adapter(given: Given, where: str) -> None:
    names = {match["name"] for key in given.source.tensors if (match := ADAPTER_NAME.search(key))}
    if len(names) > 1:
        raise AdapterError(
            f"{where} holds {len(names)} adapters in one file: {listed(sorted(names))}.",
            "save each with PEFT's save_pretrained(selected_adapters=[...])",
        )


def _clean(path: str) -> str:
    """A module path without the wrappers of training loops and without PEFT's own prefix."""
    path = WRAPPERS.sub("", path).lstrip(".")
    return path.removeprefix(PREFIX)


def _module(
    name: str, roles: Mapping[str, str], tensors: Mapping[str, TensorInfo], scaling: Any
) -> Module:
    embedding = "embedding_A" in roles
    keys = (roles["embedding_A"], roles["embedding_B"]) if embedding else (roles["A"], roles["B"])
    A, B = tensors[keys[0]], tensors[keys[1]]
    pair = pair_shape(keys[0], A, B, embedding)
    return Module(
        name=name,
        kind=pair.kind,
        out_features=pair.out_features,
        in_features=pair.in_features,
        rank=pair.rank,
        scaling=scaling(name, pair.rank),
        dtype=A.dtype if A.dtype == B.dtype else "F32",
        keys={"A": keys[0], "B": keys[1]},
        kernel=pair.kernel,
    )


def _extras(given: Given) -> tuple[Extra, ...]:
    return tuple(
        Extra(key, next(role for role, end in EXTRAS if key.endswith(end)), info)
        for key, info in given.source.tensors.items()
        if GRAMMAR.parse(key) is None
    )


def _variants(
    config: Mapping[str, Any], groups: Mapping[str, Mapping[str, str]]
) -> tuple[Variant, ...]:
    found = {variant.name: variant for variant in variants_of(config)}
    roles = {role for group in groups.values() for role in group}
    for role, variant in (("magnitude", DORA), ("lora_bias", LORA_BIAS)):
        if role in roles:
            found[variant.name] = variant
    return tuple(found.values())


def write(draft: Draft) -> Written:
    """The portable form: scale folded in, lora_alpha = r, target_modules names every module."""
    tensors: list[Stored] = []
    for module in draft.modules:
        ones = (1,) * len(module.kernel)
        channels = module.in_features
        for size in module.kernel:
            channels //= size
        a, b = (
            ("lora_embedding_A", "lora_embedding_B")
            if module.kind == "embedding"
            else ("lora_A.weight", "lora_B.weight")
        )
        A_shape = (module.rank, channels, *module.kernel)
        B_shape = (module.out_features, module.rank, *ones)
        stem = PREFIX + module.name
        tensors.append(Stored(f"{stem}.{a}", module.dtype, A_shape, module.name, "A"))
        tensors.append(Stored(f"{stem}.{b}", module.dtype, B_shape, module.name, "B"))
    source = draft.sources[0].source
    for extra in draft.extras:
        data = source.read(extra.key)
        tensors.append(Stored(extra.key, extra.info.dtype, extra.info.shape, constant=data))
    # Sorted, but not inside: the order of a rank_pattern has a meaning.
    config = dict(sorted(_config(draft).items()))
    facts = {name: config[name] for name in ("fan_in_fan_out", "lora_alpha", "r", "rank_pattern")}
    return Written(
        tensors=tuple(tensors),
        metadata={
            "format": "pt",
            "lora_adapter_metadata": json.dumps(facts, separators=(",", ":")),
        },
        companions={"adapter_config.json": (json.dumps(config, indent=2) + "\n").encode()},
    )


def _config(draft: Draft) -> dict[str, Any]:
    patterns = {} if draft.uniform else _rank_pattern(draft)
    config = portable_config(
        rank=draft.rank,
        modules=[module.name for module in draft.modules],
        patterns=patterns,
        sources=[source.config for source in draft.sources],
    )
    kept = set(config["target_modules"])
    shadowed = {name for source in draft.sources for name in source.modules} - kept
    if excluded := sorted(name for name in shadowed if not kept.isdisjoint(_tails(name))):
        # PEFT takes a target for the end of a path, and would expect tensors for these too.
        config["exclude_modules"] = excluded
    if draft.extras:
        source = draft.sources[0].config
        config["modules_to_save"] = source.get("modules_to_save")
        config["bias"] = source.get("bias", "none")
        config["trainable_token_indices"] = source.get("trainable_token_indices")
    return config


def _rank_pattern(draft: Draft) -> dict[str, int]:
    """Ranks by full path where they are not `r`, and where a shorter path would catch a module.

    A pattern is a regular expression for the end of a path; the first that matches counts. So
    longer paths come first, of equal ones that with fewer dots (each matches any character), and
    `block.lin` is named, even if its rank is `r`, where `lin` is.
    """
    own = {module.name for module in draft.modules if module.rank != draft.rank}
    named = [m for m in draft.modules if m.name in own or not own.isdisjoint(_tails(m.name))]
    named.sort(key=lambda module: (-len(module.name), module.name.count("."), module.name))
    plain = re.compile(r"[\w.-]+")
    return {m.name if plain.fullmatch(m.name) else re.escape(m.name): m.rank for m in named}


def _tails(name: str) -> list[str]:
    """Every shorter path that `name` ends in."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts))]


LAYOUT = Layout(
    name="peft",
    summary="Hugging Face PEFT: adapter_config.json and adapter_model.safetensors, or a bare file.",
    directory=True,
    explains=explains,
    read=read,
    write=write,
)
