"""What happens while a plan runs, told to whoever listens: the terminal, a test, nobody."""

from collections.abc import Callable
from typing import TypeAlias

from msgspec import Struct

__all__ = ["Advanced", "Event", "Listener", "Started", "silent"]


class Started(Struct, frozen=True):
    """A stage begins: its name and how many modules it will touch, 0 where nobody can know."""

    stage: str
    total: int


class Advanced(Struct, frozen=True):
    """`count` more modules of the current stage are done."""

    count: int


Event: TypeAlias = Started | Advanced
Listener: TypeAlias = Callable[[Event], None]


def silent(event: Event) -> None:
    """Listen to nothing."""
