"""PEFT: lora_A [r, in] and lora_B [out, r] under base_model.model., beside adapter_config.json."""

import json
import math
import re
from typing import Any

from msgspec.structs import replace

from loramerge.adapter import Adapter, Extra, Kind, Module, is_local
from loramerge.errors import AdapterError, listed
from loramerge.io._grammar import Grammar, check_owners, check_pairs, factor_shapes, pair
from loramerge.io._layout import ROUNDING, Draft, Given, Layout, Stored, Written, alpha_of
from loramerge.io._peft_config import facts, pattern, portable_config, rank_pattern, scale_of, tails
from loramerge.io._peft_experts import experts, stacked, targets
from loramerge.io._peft_keys import EXTRAS, PREFIX, beside, clean, owner, placed, saved_beside
from loramerge.io._peft_kinds import check_type, signs, unknown_fields, variants
from loramerge.io._pipeline import PREFIXED
from loramerge.io._source import Source

NAME, LABEL = r"(?P<module>.+?)", r"(\.[^.]+)?"
GRAMMAR = Grammar(
    (
        ("A", re.compile(NAME + r"\.lora_A" + LABEL + r"\.weight")),
        ("B", re.compile(NAME + r"\.lora_B" + LABEL + r"\.weight")),
        ("embedding_A", re.compile(NAME + r"\.lora_embedding_A" + LABEL)),
        ("embedding_B", re.compile(NAME + r"\.lora_embedding_B" + LABEL)),
        ("magnitude", re.compile(NAME + r"\.lora_magnitude_vector(\.[^.]+)*")),
    )
)
KINDS: tuple[tuple[Kind, str, str], ...] = (
    ("linear", "A", "B"),
    ("embedding", "embedding_A", "embedding_B"),
)
ADAPTER_NAME = re.compile(r"\.lora_(?:embedding_)?[AB]\.(?!weight$|bias$)([^.]+)")
# Config fields that a bare file carries in its header: of what it is for, its scale, its experts,
# its extras.
OF_BASE, OF_TASK = ("base_model_name_or_path", "revision"), ("task_type",)
OF_SCALE = ("fan_in_fan_out", "lora_alpha", "r", "rank_pattern")
OF_EXPERTS = ("target_parameters",)
OF_EXTRAS = ("bias", "modules_to_save", "trainable_token_indices")
# In keys of a live model's state dict only; save_pretrained leaves these segments out.
LIVE = re.compile(r"\.(original_module|modules_to_save)\.")


def explains(key: str) -> bool:
    """LoRA keys of any PEFT spelling but a pipeline's, and what PEFT may save beside them."""
    if PREFIXED.match(key):
        return False
    return saved_beside(key) or GRAMMAR.parse(key) is not None or bool(signs(key))


def owns(key: str) -> bool:
    """Factors of a layer as PEFT saves them."""
    found = GRAMMAR.parse(key) if key.startswith(PREFIX) else None
    return found is not None and found[1] in ("A", "B")


def read(given: Given) -> Adapter:
    """Describe a PEFT file. Raises AdapterError for one that no plain LoRA explains."""
    source, where = given.source, given.reference
    if given.config is not None and not given.beside:
        check_type(given.config, where)
    _check_keys(source, where)
    plain = _modules(source, where)
    found = facts(given, plain.values())
    config, notes = found.config or {}, list(found.notes)
    unscaled = found.config is None and given.alpha is None
    plain = modules = experts(config, plain, where)
    if not unscaled:
        scale = scale_of(config, given.alpha)
        if "lora_alpha" not in config and given.alpha is None:
            notes.append(f"lora_alpha {scale.alpha:g}, PEFT's default: its config does not say")
        modules = {n: replace(m, scaling=scale.of(n, m.rank)) for n, m in plain.items()}
        if wrong := [n for n, m in plain.items() if scale.contradicts(n, m.rank)]:
            notes.append(
                f"the config states another rank than the tensors of {listed(wrong, 3)}; the "
                "tensors' rank is used"
            )
    if unknown := unknown_fields(config):
        notes.append(f"config fields unknown to loramerge are left out: {listed(unknown)}")
    if unscaled:
        notes.append(
            "scale 1 and fan_in_fan_out false: the file says neither (--alpha N sets the scale)"
        )
    base = config.get("base_model_name_or_path")
    return Adapter(
        reference=where,
        layout="peft",
        modules=modules,
        source=source,
        extras=_extras(source),
        variants=variants(config, source.tensors),
        config=config,
        metadata=source.metadata,
        base_model=base if isinstance(base, str) else None,
        assumed=tuple(notes),
        scale_assumed=unscaled,
    )


def _check_keys(source: Source, where: str) -> None:
    """Raise AdapterError for what only a live model's state dict holds: several adapters, say."""
    names = {match[1] for key in source.tensors if (match := ADAPTER_NAME.search(key))}
    if len(names) > 1:
        raise AdapterError(
            f"{where} holds {len(names)} adapters in one file: {listed(sorted(names))}.",
            "save each by itself: model.save_pretrained(..., selected_adapters=[...])",
        )
    # With bias="all" PEFT saves those of a saved module under its wrappers' names as well.
    if live := [
        key
        for key in source.tensors
        if LIVE.search(key) and not (key.endswith(".bias") and LIVE.sub(".", key) in source.tensors)
    ]:
        raise AdapterError(
            f"{where} is the state dict of a live PEFT model: {listed(live, 3)}.",
            "save the adapter with model.save_pretrained(...)",
        )


def _modules(source: Source, where: str) -> dict[str, Module]:
    """Every module by its path in the base model, with scaling 1."""
    groups = GRAMMAR.group(source.tensors)
    modules: dict[str, Module] = {}
    for _, a, b in KINDS:
        check_pairs(groups, a, b, where)
    for stored, roles in groups.items():
        for kind, a, b in KINDS:
            if a not in roles:
                continue
            name, keys = clean(stored), {"A": roles[a], "B": roles[b]}
            if "magnitude" in roles:
                keys["magnitude"] = roles["magnitude"]
            if name in modules:
                raise AdapterError(
                    f"{where} holds {name} twice: {modules[name].keys['A']}, {keys['A']}.",
                    "remove one of them from the file",
                )
            A, B = source.tensors[keys["A"]], source.tensors[keys["B"]]
            modules[name] = pair(name, keys, A, B, kind)
    check_owners(
        {name: roles for name, roles in groups.items() if "embedding_A" not in roles}, "A", where
    )
    if not modules:
        raise AdapterError(
            f"{where} holds no lora_A and lora_B tensors, but {listed(list(source.tensors), 3)}.",
            "see: loramerge layouts",
        )
    return modules


def _extras(source: Source) -> tuple[Extra, ...]:
    factors = {key for key in source.tensors if GRAMMAR.parse(key) or signs(key)}
    return beside(source, factors)


def write(draft: Draft) -> Written:
    """The portable form: scale folded in, lora_alpha = r, target_modules names every module."""
    tensors: list[Stored] = []
    for module in draft.modules:
        if module.kind == "parameter":
            continue
        A, B = factor_shapes(module)
        a, b = (
            ("lora_embedding_A", "lora_embedding_B")
            if module.kind == "embedding"
            else ("lora_A.weight", "lora_B.weight")
        )
        stem = PREFIX + module.name
        tensors.append(Stored(f"{stem}.{a}", module.dtype, A, (module.name,), "A"))
        tensors.append(Stored(f"{stem}.{b}", module.dtype, B, (module.name,), "B"))
    tensors += stacked(draft)
    adapted = {module.name for module in draft.modules if module.kind != "parameter"}
    for extra in draft.extras:
        key, content = placed(extra, adapted), draft.content(extra)
        tensors.append(Stored(key, extra.info.dtype, extra.info.shape, content=content))
    # Sorted, but not inside: the order of a rank_pattern has a meaning.
    config = dict(sorted(_config(draft).items()))
    base = config["base_model_name_or_path"]
    stated = (*OF_SCALE, *OF_EXPERTS, *(OF_EXTRAS if draft.extras else ()))
    stated += OF_BASE if isinstance(base, str) and not is_local(base) else ()
    stated += OF_TASK if config["task_type"] else ()
    stated += ("alpha_pattern",) if config["alpha_pattern"] else ()
    header = {name: config[name] for name in stated if name in config}
    return Written(
        tensors=tuple(tensors),
        metadata={
            "format": "pt",
            "lora_adapter_metadata": json.dumps(header, separators=(",", ":")),
        },
        companions={"adapter_config.json": (json.dumps(config, indent=2) + "\n").encode()},
    )


def _config(draft: Draft) -> dict[str, Any]:
    patterns = {} if draft.uniform else rank_pattern(draft.modules, draft.rank)
    config = portable_config(
        rank=draft.rank,
        alpha=draft.alpha,
        modules=[module.name for module in draft.modules if module.kind != "parameter"],
        patterns=patterns,
        sources=[source.config for source in draft.sources],
    )
    config["alpha_pattern"] = pattern(
        {m.name: _alpha(m, draft) for m in draft.modules}, draft.alpha
    )
    kept = set(config["target_modules"])
    shadowed = {
        name
        for source in draft.sources
        for name, module in source.modules.items()
        if module.kind != "parameter"
    } - kept
    if excluded := sorted(name for name in shadowed if not kept.isdisjoint(tails(name))):
        # PEFT takes a target for the end of a path, and would expect tensors for these too.
        config["exclude_modules"] = excluded
    if wrapped := targets(draft):
        config["target_parameters"] = wrapped
    if draft.extras:
        saved = {owner(e) for e in draft.extras if e.role == EXTRAS[-1][0]}
        source = {"modules_to_save": sorted(saved) or None, **draft.sources[0].config}
        config |= {name: source.get(name, config.get(name)) for name in OF_EXTRAS}
        if both := {name for module in saved & kept for name in tails(module)}:
            # PEFT would leave out the LoRA of a module that is saved as well.
            names = config["modules_to_save"] or []
            config["modules_to_save"] = [n for n in names if n not in both] or None
    return config


def _alpha(module: Module, draft: Draft) -> float:
    """The alpha of a module: that of the draft where only rounding is between them."""
    own = alpha_of(module)
    return draft.alpha if math.isclose(own, draft.alpha, rel_tol=ROUNDING) else own


LAYOUT = Layout(
    name="peft",
    summary="Hugging Face PEFT: adapter_config.json and adapter_model.safetensors, or a bare file.",
    directory=True,
    explains=explains,
    owns=owns,
    read=read,
    write=write,
    scale="alpha",
)
