"""What adapters hold beside their LoRA: heads, biases, token rows, and the files of a tokenizer."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from loramerge.adapter import Adapter, source_name
from loramerge.errors import IncompatibleError, listed
from loramerge.io._open import written_as
from loramerge.recipe import Recipe

__all__ = ["KEPT", "check_extras", "flawed", "tokenizer"]

# What --extras may say where a merge keeps the tensors beside the LoRA.
KEPT = ("first", "mean")
# Modules and tensors that hold something of each token.
OF_TOKENS = ("embed", "lm_head", "wte", "token_adapter", "shared")


def check_extras(recipe: Recipe, adapters: Sequence[Adapter]) -> list[str]:
    """What becomes of the tensors beside the LoRA, as notes.

    Raises IncompatibleError where --extras does not say, or the layout cannot hold them.
    """
    holders = [adapter for adapter in adapters if adapter.extras]
    if not holders:
        return []
    what = "; ".join(
        f"{a.reference} holds {len(a.extras)} tensors beside its LoRA "
        f"({listed([f'{extra.key}: {extra.role}' for extra in a.extras], 3)})"
        for a in holders
    )
    dropped_all = len(adapters) > 1 and recipe.merge.extras == "drop"
    if recipe.settings.to not in ("same", written_as(adapters[0])) and not dropped_all:
        raise IncompatibleError(
            f"{what}, which {recipe.settings.to} cannot hold.", "leave out --to"
        )
    if len(adapters) == 1:
        return [f"carried unchanged: {listed([extra.key for extra in adapters[0].extras])}"]
    if recipe.merge.extras == "error":
        raise IncompatibleError(
            f"{what}; a sum of updates has no place for them.",
            "--extras first keeps the first adapter's, mean their mean; drop leaves them out",
        )
    if recipe.merge.extras == "mean":
        return _averaged(adapters)
    taken = adapters[0].extras if recipe.merge.extras in KEPT else ()
    dropped = [
        f"{source_name(a)}: {extra.key}"
        for position, a in enumerate(adapters)
        for extra in a.extras
        if position or not taken
    ]
    source = source_name(adapters[0])
    notes = [f"carried from {source}: {listed([e.key for e in taken])}"] if taken else []
    return notes + ([f"dropped: {listed(dropped)}"] if dropped else [])


def _averaged(adapters: Sequence[Adapter]) -> list[str]:
    """A note on extras whose mean is taken. Raises where they are not the same in every adapter."""
    shapes = [{extra.key: extra.info.shape for extra in a.extras} for a in adapters]
    keys = list(dict.fromkeys(key for one in shapes for key in one))
    unlike = [key for key in keys if len({one.get(key) for one in shapes}) > 1]
    rows = [e.key for a in adapters for e in a.extras if e.role == "token rows"]
    if unlike or rows:
        raise IncompatibleError(
            f"--extras mean needs the same tensors in every adapter; these differ, or belong to "
            f"other tokens or labels: {listed(list(dict.fromkeys(unlike + rows)), 4)}.",
            "use --extras first or --extras drop",
        )
    return [f"the mean of all adapters: {listed(keys)}"]


def flawed(carried: Sequence[str]) -> list[str]:
    """A note on tensors that are carried with NaN or Inf in them, which factors may not hold.

    Nothing is computed with them, and rows of no token, or a mask, may well hold such.
    """
    if not carried:
        return []
    return [f"warning: NaN or Inf beside the LoRA, carried as it is: {listed(list(carried))}"]


def tokenizer(
    extras: str, adapters: Sequence[Adapter], modules: Iterable[str] = ()
) -> tuple[dict[str, Path], list[str]]:
    """The files of a tokenizer that go with a result, and what is said of the others.

    Those of one adapter are carried; of several those that are the same wherever they are, or the
    first adapter's where --extras says so. They are never opened but to compare which tokens were
    added: raises IncompatibleError where these differ and `modules` of the result, or tensors
    beside it, hold something of each token.
    """
    _check_vocabularies(extras, adapters, modules)
    if len(adapters) == 1 or extras == "first":
        return dict(adapters[0].tokenizer), []
    if extras == "drop":
        return {}, []
    holders = [adapter for adapter in adapters if adapter.tokenizer]
    names = list(dict.fromkeys(name for adapter in holders for name in adapter.tokenizer))
    same = {name: path for name in names if (path := _alike(name, holders)) is not None}
    left = [name for name in names if name not in same]
    note = f"files of a tokenizer that differ are left out: {listed(left)} (--extras first keeps)"
    return same, [note] if left else []


def _alike(name: str, holders: Sequence[Adapter]) -> Path | None:
    """The file of a name, where all that have it have the same bytes."""
    paths = [adapter.tokenizer[name] for adapter in holders if name in adapter.tokenizer]
    first = paths[0].read_bytes()
    return paths[0] if all(path.read_bytes() == first for path in paths[1:]) else None


def _check_vocabularies(extras: str, adapters: Sequence[Adapter], modules: Iterable[str]) -> None:
    added = {source_name(one): _added(one) for one in adapters if one.tokenizer}
    known = {name: tokens for name, tokens in added.items() if tokens is not None}
    if len({tuple(sorted(tokens.items())) for tokens in known.values()}) < 2:
        return
    # Of one adapter alone they fit its tokenizer, which goes with them.
    beside = [] if extras in ("first", "drop") else [e.key for a in adapters for e in a.extras]
    involved = [name for name in [*modules, *beside] if any(word in name for word in OF_TOKENS)]
    if involved:
        every = {pair for tokens in known.values() for pair in tokens.items()}
        apart = sorted({t for t, n in every if any(one.get(t) != n for one in known.values())})
        raise IncompatibleError(
            f"{listed(list(known))} have added other tokens, or others of a number: "
            f"{listed(apart, 4)}; {listed(involved, 3)} hold something of each token.",
            "leave them out: --exclude for modules, --extras first or drop for the rest",
        )


def _added(adapter: Adapter) -> dict[str, int] | None:
    """The tokens that were added, by number, as the first file says that does; None without one."""
    for name in ("added_tokens.json", "tokenizer_config.json", "tokenizer.json"):
        if name not in adapter.tokenizer:
            continue
        try:
            found: Any = json.loads(adapter.tokenizer[name].read_bytes())
            if name == "added_tokens.json":
                return {str(token): int(number) for token, number in found.items()}
            if name == "tokenizer.json":
                return {str(one["content"]): int(one["id"]) for one in found["added_tokens"]}
            decoder = found["added_tokens_decoder"]
            return {str(one["content"]): int(number) for number, one in decoder.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue  # another file may say it
    return None
