"""What happens while a plan runs, told to whoever listens: the terminal, a test, nobody."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Advanced", "Event", "Listener", "Started", "silent"]


@dataclass(frozen=True, slots=True)
class Started:
    """A stage begins: its name and how many modules it will touch."""

    stage: str
    total: int


@dataclass(frozen=True, slots=True)
class Advanced:
    """`count` more modules of the current stage are done."""

    count: int


Event: TypeAlias = Started | Advanced
Listener: TypeAlias = Callable[[Event], None]


def silent(event: Event) -> None:
    """Listen to nothing."""
