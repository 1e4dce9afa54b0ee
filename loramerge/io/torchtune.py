"""torchtune's own checkpoints: layers.0.attn.q_proj.lora_a.weight [r, in] and lora_b [out, r]."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from loramerge.adapter import Adapter, Module, public_base
from loramerge.io._files import TEXT_LIMIT
from loramerge.io._grammar import Grammar, check_owners, check_pairs, dora, factor_shapes, pair
from loramerge.io._layout import Draft, Given, Layout, Stored, Written
from loramerge.io._names import OF_MODEL
from loramerge.io._peft_config import scale_of

NAME = r"(?P<module>.+)"
GRAMMAR = Grammar(
    (
        ("A", re.compile(NAME + r"\.lora_a\.weight")),
        ("B", re.compile(NAME + r"\.lora_b\.weight")),
        ("magnitude", re.compile(NAME + r"\.magnitude")),
    )
)
# Of adapter_config.json, and of the header that `write` makes.
BASE = "base_model_name_or_path"


def explains(key: str) -> bool:
    """Factors in lower case with `.weight`, and DoRA's magnitudes."""
    return GRAMMAR.parse(key) is not None


def marks(key: str) -> bool:
    """A factor: what no other layout has."""
    parsed = GRAMMAR.parse(key)
    return parsed is not None and parsed[1] != "magnitude"


def read(given: Given) -> Adapter:
    """Describe a checkpoint: dW = alpha / r lora_b lora_a.

    alpha stands in the adapter_config.json that torchtune saves beside it, or is --alpha. Names are
    torchtune's own (w1, output_proj). Rows of q_proj and k_proj stand in another order than in
    Hugging Face's checkpoints, by the number of heads: the model's config.json, which torchtune
    copies there, says it.
    """
    source, where = given.source, given.reference
    groups = GRAMMAR.group(source.tensors)
    check_pairs(groups, "A", "B", where)
    check_owners(groups, "A", where)
    modules = {
        name: pair(name, roles, source.tensors[roles["A"]], source.tensors[roles["B"]], "linear")
        for name, roles in groups.items()
    }
    config = _stated(given, modules)
    silent = given.alpha is None and "lora_alpha" not in config
    if not silent:
        scale = scale_of(config, given.alpha)
        modules = {n: replace(m, scaling=scale.of(n, m.rank)) for n, m in modules.items()}
    base = config.get(BASE)
    return Adapter(
        reference=where,
        layout="torchtune",
        modules=modules,
        source=source,
        naming="torchtune",
        variants=dora(groups, "magnitude", "merge it into its base model with torchtune"),
        config={**config, **_model(source.path.with_name("config.json"))},
        metadata=source.metadata,
        base_model=base if isinstance(base, str) else None,
        assumed=("scale 1: the file does not say its alpha (--alpha N sets it)",) if silent else (),
        scale_assumed=silent,
    )


def _stated(given: Given, modules: Mapping[str, Module]) -> Mapping[str, Any]:
    """What a header that `write` made says, or an adapter_config.json that states these ranks."""
    header = given.source.metadata
    try:
        return {BASE: header.get(BASE), "lora_alpha": float(header["lora_alpha"])}
    except (KeyError, ValueError):
        pass
    config = given.config or {}
    if config.get("peft_type") != "LORA":
        return {}
    scale = scale_of(config, None)
    other = any(scale.contradicts(name, module.rank) for name, module in modules.items())
    return {} if other else config


def _model(path: Path) -> dict[str, Any]:
    """What a model's config.json says of the order of rows; nothing where there is none."""
    try:
        whole = path.is_file() and path.stat().st_size <= TEXT_LIMIT
        found = json.loads(path.read_bytes()) if whole else None
    except (OSError, ValueError, RecursionError):
        return {}
    return {k: found[k] for k in OF_MODEL if k in found} if isinstance(found, dict) else {}


def write(draft: Draft) -> Written:
    """The same keys, to be loaded with alpha equal to the rank.

    The header says the base model, by which rows change places or do not.
    """
    tensors = []
    for module in draft.modules:
        A, B = factor_shapes(module)
        whose = (module.name,)
        tensors.append(Stored(f"{module.name}.lora_a.weight", module.dtype, A, whose, "A"))
        tensors.append(Stored(f"{module.name}.lora_b.weight", module.dtype, B, whose, "B"))
    metadata = {"lora_alpha": str(draft.rank)}
    bases = {public_base(source) for source in draft.sources}
    if len(bases) == 1 and (base := bases.pop()):
        metadata[BASE] = base
    return Written(tensors=tuple(tensors), metadata=metadata)


LAYOUT = Layout(
    name="torchtune",
    summary="torchtune's own checkpoints; what is written is loaded with lora_alpha = lora_rank.",
    directory=False,
    explains=explains,
    read=read,
    write=write,
    marks=marks,
    naming="torchtune",
    one_rank=True,
)
