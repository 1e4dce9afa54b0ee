"""Which files make an adapter: the names of weights, config and card, on disk as on the Hub."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from loramerge.errors import AdapterError
from loramerge.io._source import Source
from loramerge.origin import Origin

__all__ = ["Found", "is_own", "is_pickle", "licence", "parsed", "pick"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CARD = "README.md"
SUFFIX = ".safetensors"
# The names PEFT, diffusers and MLX give the weights in a directory, beside checkpoints of others.
USUAL = (WEIGHTS, "pytorch_lora_weights.safetensors", "adapters.safetensors")
# Files of a tokenizer, which are copied and never loaded: a chat template is a program.
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
    "chat_template.jinja",
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
USUAL_PICKLES = ("adapter_model.bin", "pytorch_lora_weights.bin", "adapter_model.pt")
# Bytes of a config or a card; those seen have a few thousand.
TEXT_LIMIT = 1_000_000
AGAIN = "save the adapter again"


class Found(Struct, frozen=True):
    """The files of one adapter: opened weights, the config with them, and what the Hub says.

    `beside` tells that the config lies beside weights of another name than PEFT's.
    """

    source: Source
    config: Mapping[str, Any] | None
    beside: bool
    origin: Origin | None = None
    licence: str | None = None
    tokenizer: Mapping[str, Path] = field(default_factory=dict)


def pick(names: Iterable[str], pickles: bool = False) -> str | None:
    """The weights file among the names in one folder; None where there is none or no telling.

    Where `pickles` are allowed, one is taken if there is no safetensors file.
    """
    known = list(names)
    files = [name for name in known if name.endswith(SUFFIX)]
    if pickles and not files:
        files = [name for name in known if name.endswith(PICKLES)]
    for usual in (*USUAL, *USUAL_PICKLES):
        if usual in files:
            return usual
    return files[0] if len(files) == 1 else None


def is_own(name: str) -> bool:
    """Whether weights of this name are those that an adapter_config.json beside them is about."""
    return name.rpartition(".")[0] == WEIGHTS.removesuffix(SUFFIX)


def parsed(where: object, text: bytes, limit: int = TEXT_LIMIT) -> Mapping[str, Any]:
    """An adapter_config.json. Raises AdapterError for anything but a JSON object."""
    if len(text) > limit:
        raise AdapterError(f"{where} is larger than {limit:,} bytes.", AGAIN)
    try:
        config = json.loads(text.decode())
        json.dumps(config, ensure_ascii=False).encode()  # half a surrogate pair cannot be printed
    except (ValueError, RecursionError):
        raise AdapterError(f"{where} is not JSON.", AGAIN) from None
    if not isinstance(config, dict):
        raise AdapterError(f"{where} is not a JSON object.", AGAIN)
    return config


def is_pickle(where: object) -> AdapterError:
    """The refusal of a file that is no safetensors file but may run code."""
    suffix = str(where)[str(where).rindex(".") :]
    return AdapterError(
        f"{where} is a pickle ({suffix}), which can run code when it is opened.",
        "--allow-pickle reads the tensors in it and runs nothing",
    )


def licence(card: bytes) -> str | None:
    """The licence that the front matter of a model card states, None without one."""
    front = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", card.decode("utf-8-sig", "replace"), re.S)
    found = front and re.search(r"^license:[ \t]*[\"']?([\w.+-]+)[\"']?\s*$", front[1], re.M)
    return found[1] if found else None
