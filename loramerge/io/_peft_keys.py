"""Keys of PEFT's files, whatever the tuner: prefixes, wrappers, and what is saved beside."""

import re
from collections.abc import Collection, Iterable, Sequence

from loramerge.adapter import Adapter, Extra, Module
from loramerge.io._layout import Given
from loramerge.io._source import Source

__all__ = ["EXTRAS", "PREFIX", "beside", "clean", "owner", "placed", "saved_beside", "tuned"]

PREFIX = "base_model.model."
# What training loops wrap around a model; PEFT itself would then load nothing.
WRAPPERS = re.compile(
    r"^((module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+"
    r"|(?<=\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# Tensors beside the factors, by the end of their key: what they are to PEFT.
EXTRAS = (
    ("token rows", ".token_adapter.trainable_tokens_delta"),
    ("bias", ".bias"),
    ("saved module", ""),
)
# What is kept of a module, by the end of its key.
OF_MODULE = re.compile(r"(\.base_layer)?\.(weight|bias)$")
# What PEFT's tuners call their own tensors.
TUNED = re.compile(r"[._](lora|vera|vblora|randlora|hada|lokr)_")


def saved_beside(key: str) -> bool:
    """Whether PEFT may have saved a tensor beside those of a tuner: a head, a bias, token rows."""
    return WRAPPERS.sub("", key).startswith(PREFIX) and TUNED.search(key) is None


def tuned(
    given: Given,
    layout: str,
    modules: Iterable[Module],
    parts: Collection[str] = (),
    *,
    notes: Sequence[str] = (),
    scale_assumed: bool = False,
) -> Adapter:
    """The adapter of one of PEFT's tuners, from now on as plain LoRA with the facts of its config.

    `parts` are keys of the tuner's own, beyond those of `modules`.
    """
    found, config = {module.name: module for module in modules}, given.config or {}
    own = {key for module in found.values() for key in module.keys.values()}
    base = config.get("base_model_name_or_path")
    # Such as vera_only, which LoRA does not know.
    own_bias = str(config.get("bias", "none")).endswith("_only")
    return Adapter(
        reference=given.reference,
        layout=layout,
        modules=found,
        source=given.source,
        extras=beside(given.source, own | set(parts)),
        config={**config, "peft_type": "LORA", **({"bias": "lora_only"} if own_bias else {})},
        metadata=given.source.metadata,
        base_model=base if isinstance(base, str) else None,
        assumed=tuple(notes),
        scale_assumed=scale_assumed,
    )


def clean(path: str) -> str:
    """A path without the wrappers of training loops and without PEFT's own prefix."""
    return WRAPPERS.sub("", path).removeprefix(PREFIX)


def owner(extra: Extra) -> str:
    """The module that an extra is a tensor of, whether PEFT wraps it or not."""
    return OF_MODULE.sub("", clean(extra.key))


def placed(extra: Extra, adapted: Collection[str]) -> str:
    """The key of an extra beside these modules, whose own weights are under base_layer."""
    path, module = clean(extra.key), owner(extra)
    wrapper = ".base_layer" if module in adapted else ""
    return PREFIX + (path if path == module else f"{module}{wrapper}.{path.rpartition('.')[2]}")


def beside(source: Source, known: Collection[str]) -> tuple[Extra, ...]:
    """The tensors that are not `known` as parts of a module, by what they are to PEFT."""
    return tuple(
        Extra(key, next(role for role, end in EXTRAS if key.endswith(end)), info)
        for key, info in source.tensors.items()
        if key not in known
    )
