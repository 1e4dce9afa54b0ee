"""torchtune's own checkpoints: layers.0.attn.q_proj.lora_a.weight [r, in] and lora_b [out, r]."""

import re
from collections.abc import Mapping

from msgspec.structs import replace

from loramerge.adapter import Adapter
from loramerge.io._grammar import Grammar, check_owners, check_pairs, dora, factor_shapes, pair
from loramerge.io._layout import Draft, Given, Layout, Stored, Written

NAME = r"(?P<module>.+)"
GRAMMAR = Grammar(
    (
        ("A", re.compile(NAME + r"\.lora_a\.weight")),
        ("B", re.compile(NAME + r"\.lora_b\.weight")),
        ("magnitude", re.compile(NAME + r"\.magnitude")),
    )
)


def explains(key: str) -> bool:
    """Factors in lower case with `.weight`, and DoRA's magnitudes."""
    return GRAMMAR.parse(key) is not None


def marks(key: str) -> bool:
    """A factor: what no other layout has."""
    parsed = GRAMMAR.parse(key)
    return parsed is not None and parsed[1] != "magnitude"


def read(given: Given) -> Adapter:
    """Describe a checkpoint: dW = alpha / r lora_b lora_a. torchtune does not store alpha: --alpha.

    Names are torchtune's own (w1, output_proj). Rows of q_proj and k_proj stand in another order
    than in Hugging Face's checkpoints, by the number of heads, which the file does not hold.
    """
    source, where = given.source, given.reference
    groups = GRAMMAR.group(source.tensors)
    check_pairs(groups, "A", "B", where)
    check_owners(groups, "A", where)
    alpha = given.alpha or _stated(source.metadata)
    modules = {}
    for name, roles in groups.items():
        module = pair(name, roles, source.tensors[roles["A"]], source.tensors[roles["B"]], "linear")
        modules[name] = replace(module, scaling=alpha / module.rank if alpha else 1.0)
    silent = alpha is None
    return Adapter(
        reference=where,
        layout="torchtune",
        modules=modules,
        source=source,
        naming="torchtune",
        variants=dora(groups, "magnitude", "merge it into its base model with torchtune"),
        metadata=source.metadata,
        assumed=("scale 1: the file does not say its alpha (--alpha N sets it)",) if silent else (),
        scale_assumed=silent,
    )


def _stated(metadata: Mapping[str, str]) -> float | None:
    """The alpha in a header that `write` made."""
    try:
        return float(metadata["lora_alpha"])
    except (KeyError, ValueError):
        return None


def write(draft: Draft) -> Written:
    """The same keys, to be loaded with alpha equal to the rank."""
    tensors = []
    for module in draft.modules:
        A, B = factor_shapes(module)
        whose = (module.name,)
        tensors.append(Stored(f"{module.name}.lora_a.weight", module.dtype, A, whose, "A"))
        tensors.append(Stored(f"{module.name}.lora_b.weight", module.dtype, B, whose, "B"))
    return Written(tensors=tuple(tensors), metadata={"lora_alpha": str(draft.rank)})


LAYOUT = Layout(
    name="torchtune",
    summary="torchtune's own checkpoints, scale by --alpha; loaded with lora_alpha = lora_rank.",
    directory=False,
    explains=explains,
    read=read,
    write=write,
    marks=marks,
    naming="torchtune",
    one_rank=True,
)
