"""Layouts that are recognised by their keys but not read: named, never guessed at."""

import re
from collections.abc import Iterable

from msgspec import Struct

__all__ = ["FOREIGN", "Foreign", "recognise", "samples"]


class Foreign(Struct, frozen=True):
    """A layout by the keys that give it away, and what a user can do with it today."""

    name: str
    pattern: re.Pattern[str]
    hint: str


def _foreign(name: str, pattern: str, hint: str) -> Foreign:
    return Foreign(name, re.compile(pattern), hint)


KOHYA = r"(lora|lycoris)_[^.]+"
PEFT = r"base_model\.model\..+"
TO_PLAIN = "train or save it as plain LoRA (network_module networks.lora, no conv_dim algorithms)"
TO_LORA = "convert it in PEFT: peft.save_as_lora('converted', model, rank=16)"
INTO_BASE = "merge it into its base model in PEFT: model.merge_and_unload()"

# The first that matches any key names the file, so the special stand before the general.
FOREIGN = (
    _foreign(
        "Megatron/NeMo",
        r".+\.adapter\.linear_(in|out)\.weight",
        "export it to Hugging Face PEFT with NeMo's Megatron-Bridge",
    ),
    _foreign("PEFT RandLoRA", r".+\.randlora_.+", TO_LORA),
    _foreign("PEFT MiSS", r".+\.(miss|bone)_block(\..+)?", TO_LORA),
    _foreign("PEFT FourierFT", r".+\.(fourierft|waveft)_spectrum(\..+)?", TO_LORA),
    _foreign("PEFT HiRA", r".+\.hira_(embedding_)?[AB](\..+)?", INTO_BASE),
    _foreign("PEFT HRA", r".+\.hra_u(\..+)?", INTO_BASE),
    _foreign("PEFT SHiRA", r".+\.shira_.+", INTO_BASE),
    _foreign("PEFT IA3", r".+\.ia3_l(\..+)?", INTO_BASE),
    _foreign("PEFT OFT or BOFT", PEFT + r"\.(oft|boft)_[rsR](\..+)?", INTO_BASE),
    _foreign("LyCORIS GLoRA", KOHYA + r"\.[ab][12]\.weight", TO_PLAIN),
    _foreign("LyCORIS OFT", KOHYA + r"\.oft_(blocks|diag)", TO_PLAIN),
    _foreign("LyCORIS IA3", KOHYA + r"\.on_input", TO_PLAIN),
)


def recognise(keys: Iterable[str]) -> Foreign | None:
    """The first foreign layout one of the keys gives away."""
    for foreign in FOREIGN:
        if any(foreign.pattern.fullmatch(key) for key in keys):
            return foreign
    return None


def samples(keys: Iterable[str]) -> list[str]:
    """One key of each form: a few per file, however many layers it has."""
    return list({re.sub(r"(?<=[._:])\d+(?=[._:]|$)", "0", key): key for key in keys}.values())
