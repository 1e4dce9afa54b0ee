"""Adapters as they were typed, with what is said of each; then opened, headers only."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import click
from msgspec.structs import replace

from loramerge.cli.command import PICKLES
from loramerge.errors import LoramergeError, UsageError
from loramerge.events import Started
from loramerge.recipe import Named

if TYPE_CHECKING:
    from loramerge.adapter import Adapter

__all__ = ["named_adapters", "opened"]

# Adapters opened at a time: on the Hub each takes three answers one after the other.
CONNECTIONS = 8
# The word that leaves a layout to be told from the keys.
AUTO = "auto"
Fact = TypeVar("Fact")


def named_adapters(
    adapters: Sequence[str],
    weights: Sequence[float] = (),
    alphas: Sequence[float] = (),
    layouts: Sequence[str] = (),
) -> list[Named]:
    """Adapters with what was said of them. Raises UsageError for a count that does not fit."""
    count = len(adapters)
    if weights and adapters and len(weights) != count:
        raise UsageError(
            f"{_counted(len(weights), 'weight')} for {_counted(count, 'adapter')}.",
            "give one -w for each adapter, in their order",
        )
    from loramerge.io._open import layout

    stated = _each(alphas, count, "--alpha")
    read_as = [
        None if name == AUTO else layout(name).name for name in _each(layouts, count, "--from")
    ]
    facts = zip(
        adapters,
        weights or (1.0,) * count,
        stated or (None,) * count,
        read_as or (None,) * count,
        strict=False,
    )
    return [Named(*one) for one in facts]


def _each(given: Sequence[Fact], count: int, flag: str) -> Sequence[Fact]:
    """What was said once for all, or once for each, or not at all."""
    if len(given) > 1 and count and len(given) != count:
        raise UsageError(
            f"{len(given)} {flag} for {_counted(count, 'adapter')}.",
            f"give one {flag} for all, or one for each adapter, in their order",
        )
    return [*given] * count if len(given) == 1 else given


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def opened(named: Sequence[Named], *, look: bool = False) -> list["Adapter"]:
    """Every adapter, headers only. Raises with the problems of all that cannot be read.

    To `look` is to download no tensor, even where a layout would need one to say its scale; those
    that do are downloaded side by side. Pickles are read where the command line allows it. One that
    is named several times is opened once.
    """
    from loramerge.cli.progress import progress
    from loramerge.io._hub import fetch
    from loramerge.io._open import is_unread, on_hub

    context = click.get_current_context()
    remote = [one for one in named if on_hub(one.reference)]
    with progress(bool(context.params.get("quiet"))) as listen:
        if not remote:
            return _opened(named, look)
        listen(Started("asking the Hub", 0))
        found = _opened(named, True)
        if look or not (unread := [one for one in found if is_unread(one)]):
            return found
        fetch(unread, listen)
        return _opened(named, False)


def _opened(named: Sequence[Named], look: bool) -> list["Adapter"]:
    from loramerge.adapter import Adapter
    from loramerge.io._open import open_adapter
    from loramerge.workers import side_by_side

    allowed = click.get_current_context().meta[PICKLES]

    def one(given: Named) -> Adapter | LoramergeError:
        try:
            return open_adapter(
                given.reference,
                given.alpha,
                look=look,
                named=given.layout,
                allow_pickle=allowed,
                shared=given.shared,
            )
        except LoramergeError as error:
            return error

    alike = [replace(given, weight=1.0) for given in named]
    distinct = list(dict.fromkeys(alike))
    outcomes = dict(zip(distinct, side_by_side(one, distinct, CONNECTIONS), strict=True))
    problems = [outcome for outcome in outcomes.values() if isinstance(outcome, LoramergeError)]
    if len(problems) > 1:
        messages = " ".join(dict.fromkeys(error.message for error in problems))
        raise type(problems[0])(messages, problems[0].hint)
    if problems:
        raise problems[0]
    found = {given: one for given, one in outcomes.items() if isinstance(one, Adapter)}
    return [found[given] for given in alike]
