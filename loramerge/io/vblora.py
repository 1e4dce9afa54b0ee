"""PEFT's VB-LoRA: factors as mixtures of a shared bank of vectors, chosen by logits."""

import math
import re
from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from loramerge._lazy import np
from loramerge.adapter import Adapter, Array, LowRank, Module, TensorSource
from loramerge.errors import AdapterError, UsageError
from loramerge.io._grammar import INCOMPLETE, Grammar, check_pairs
from loramerge.io._layout import Given, Layout
from loramerge.io._peft_keys import clean, saved_beside, tuned
from loramerge.io._source import Source

NAME = r"(?P<module>.+?)"
GRAMMAR = Grammar(
    tuple(
        (f"{part} {what}".strip(), re.compile(NAME + rf"\.vblora_logits_{part}{end}"))
        for part in "AB"
        for what, end in (("", ""), ("indices", "_topk_indices"), ("weights", "_topk_weights"))
    )
)
BANK = "base_model.vblora_vector_bank"
INTEGERS = {"U8": "u1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
DEFAULT_TOPK = 2  # PEFT's


def explains(key: str) -> bool:
    """Logits, the bank, and what PEFT saves beside them."""
    return marks(key) or saved_beside(key)


def marks(key: str) -> bool:
    """Logits or the bank: what no other layout has."""
    return GRAMMAR.parse(key) is not None or key == BANK


def read(given: Given) -> Adapter:
    """Describe an adapter: every piece of A and B is the mean of topk vectors of the bank.

    Its weights are the softmax of the topk largest logits. A file saved with
    save_only_topk_weights has these already, but for the last, which completes the sum to 1.
    """
    source, where = given.source, given.reference
    if given.alpha is not None:
        raise UsageError(f"{where}: VB-LoRA has no alpha.", "leave --alpha out")
    groups = GRAMMAR.group(source.tensors)
    for end in ("", " indices", " weights"):
        check_pairs(groups, f"A{end}", f"B{end}", where)
    check_pairs(groups, "A indices", "A weights", where)
    if BANK not in source.tensors:
        raise AdapterError(
            f"{where} does not hold {BANK}.",
            "complete it from a file that holds it: "
            "loramerge convert ADAPTER --to peft --shared FILE",
        )
    config = given.config or {}
    topk = config.get("topk", DEFAULT_TOPK)
    if not isinstance(topk, int) or topk < 1:
        raise AdapterError(f"adapter_config.json: topk is {topk!r}.", "correct adapter_config.json")
    modules = [_module(source, name, roles, topk) for name, roles in groups.items()]
    notes = () if "topk" in config else (f"topk {DEFAULT_TOPK}, PEFT's default",)
    return tuned(given, "vblora", modules, notes=notes)


def _module(source: Source, name: str, roles: Mapping[str, str], topk: int) -> Module:
    a, b = (source.tensors[roles[p if p in roles else f"{p} indices"]].shape for p in "AB")
    bank = source.tensors[BANK]
    fits = len(a) == len(b) == 3 and a[0] == b[1] and len(bank.shape) == 2
    for part, shape in (("A", a), ("B", b)):
        if part in roles:
            fits = fits and shape[2:] == bank.shape[:1]
        else:  # the last weight is what the others leave of 1
            weights = source.tensors[roles[f"{part} weights"]].shape
            fits = fits and weights == (*shape[:2], shape[2] - 1)
    if not fits:
        raise AdapterError(
            f"{name}: logits {list(a)} and {list(b)} with a bank {list(bank.shape)} do not "
            "multiply.",
            INCOMPLETE,
        )
    return Module(
        name=clean(name),
        kind="linear",
        out_features=b[0] * bank.shape[1],
        in_features=a[1] * bank.shape[1],
        rank=a[0],
        scaling=1.0,
        dtype=bank.dtype,
        keys={**roles, "bank": BANK},
        form=_Mixture(topk),
    )


class _Mixture(Struct, frozen=True):
    """A form: pieces of A [r, in / d, d] and B [out / d, r, d] out of a bank [h, d]."""

    topk: int

    def __call__(self, source: TensorSource, module: Module) -> LowRank:
        A, B = (self._mixed(source, module.keys, part) for part in "AB")
        return LowRank(
            A=A.reshape(module.rank, module.in_features),
            B=B.swapaxes(1, 2).reshape(module.out_features, module.rank),
        )

    def _mixed(self, source: TensorSource, keys: Mapping[str, str], part: str) -> Array:
        bank = source.array(keys["bank"])
        if part in keys:
            logits = source.array(keys[part])
            indices = np.argsort(-logits, axis=-1, kind="stable")[..., : self.topk]
            chosen = np.take_along_axis(logits, indices, axis=-1)
            shares = np.exp(chosen - chosen[..., :1])
            weights = shares / shares.sum(axis=-1, keepdims=True)
        else:
            indices = _integers(source, keys[f"{part} indices"])
            if indices.max(initial=0) >= len(bank):
                raise AdapterError(
                    f"{keys[f'{part} indices']} names vector {indices.max()} of a bank of "
                    f"{len(bank)}.",
                    INCOMPLETE,
                )
            stored = source.array(keys[f"{part} weights"])
            weights = np.concatenate([stored, 1 - stored.sum(axis=-1, keepdims=True)], axis=-1)
        pieces: Array = (weights[..., None] * bank[indices]).sum(axis=-2)
        return pieces


def _integers(source: TensorSource, key: str) -> "np.typing.NDArray[Any]":
    info = source.tensors[key]
    if info.dtype not in INTEGERS:
        raise AdapterError(f"{key} is stored as {info.dtype}, not as integers.", INCOMPLETE)
    found = np.frombuffer(source.read(key), INTEGERS[info.dtype])
    assert len(found) == math.prod(info.shape)
    return found.reshape(info.shape)


LAYOUT = Layout(
    name="vblora",
    summary="PEFT's VB-LoRA: mixtures of a shared vector bank. Written as PEFT.",
    directory=True,
    explains=explains,
    read=read,
    marks=marks,
    writes="peft",
)
