"""Black Forest Labs' control LoRAs (depth, canny) of Flux: pairs, biases of lora_B, whole norms."""

import re

from loramerge.adapter import Adapter, Extra
from loramerge.errors import IncompatibleError
from loramerge.io._grammar import Grammar, scaled
from loramerge.io._layout import Draft, Given, Layout, Written
from loramerge.io._pipeline import agreed, carried, own_scale, pairs

NAME = r"(?P<module>(?:double_blocks|single_blocks|final_layer|\w+_in)(?:\.[^.]+)*?)"
GRAMMAR = Grammar(
    (
        ("A", re.compile(NAME + r"\.lora_A\.weight")),
        ("B", re.compile(NAME + r"\.lora_B\.weight")),
        ("bias", re.compile(NAME + r"\.lora_B\.bias")),
        ("norm", re.compile(NAME + r"\.(?:query|key)_norm\.scale")),
    )
)
NORM = re.compile(r"(?:double|single)_blocks\..+\.(?:query|key)_norm\.scale")
BESIDE = {".bias": "bias of lora_B", ".scale": "norm"}


def explains(key: str) -> bool:
    """Pairs, their biases, and norms, under Flux's own names."""
    return GRAMMAR.parse(key) is not None


def marks(key: str) -> bool:
    """A norm that is stored whole: what no other layout has."""
    return NORM.fullmatch(key) is not None


def read(given: Given) -> Adapter:
    """Describe a file: B @ A as it is stored; biases and norms replace or add what no sum holds.

    img_in reads twice the channels of Flux's own, as FluxControl has them.
    """
    own_scale(given)
    source = given.source
    extras = [
        Extra(key, BESIDE[key[key.rindex(".") :]], info)
        for key, info in source.tensors.items()
        if key.endswith(tuple(BESIDE))
    ]
    beside = {extra.key for extra in extras}
    groups = GRAMMAR.group(key for key in source.tensors if key not in beside)
    modules, _ = scaled(source, groups, given.reference)
    return Adapter(
        reference=given.reference,
        layout="bfl",
        modules=modules,
        source=source,
        naming="bfl",
        extras=tuple(extras),
        metadata=source.metadata,
        base_model="flux1",
    )


def write(draft: Draft) -> Written:
    """The same keys, with scale 1: no other would fit the biases.

    Raises IncompatibleError where there are no norms, without which it is no control LoRA.
    """
    if not any(marks(extra.key) for extra in draft.extras):
        raise IncompatibleError(
            "A control LoRA of Black Forest Labs holds norms beside its pairs; these adapters do "
            "not, or are not to keep them.",
            "choose another --to, or keep the norms: --extras first",
        )
    tensors = (*pairs(draft, "lora_A.weight", "lora_B.weight"), *carried(draft))
    return Written(tensors, {"format": "pt", **agreed(draft)})


LAYOUT = Layout(
    name="bfl",
    summary="Black Forest Labs' control LoRAs of Flux, with biases and norms beside the pairs.",
    directory=False,
    explains=explains,
    read=read,
    write=write,
    marks=marks,
    naming="bfl",
    unscaled=True,
)
