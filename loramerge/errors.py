"""What can go wrong, as one tree: the class decides the exit code, the message says what to do.

LoramergeError            exit 1
├── AdapterError          a file or directory that is not a readable adapter
├── HubError              the Hub cannot be reached, or refuses what was asked for
├── IncompatibleError     adapters that do not belong together, or a method that cannot take them
├── OutputError           the result cannot be written where it was asked for
├── UsageError            exit 2: the command itself is wrong
└── GateError             exit 3: a bound that was asked for was not met
"""

__all__ = [
    "AdapterError",
    "GateError",
    "HubError",
    "IncompatibleError",
    "LoramergeError",
    "OutputError",
    "UsageError",
    "listed",
]


class LoramergeError(Exception):
    """A failure the user can act on: one sentence, and the next thing to type."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class AdapterError(LoramergeError):
    """A file or directory that is not a readable adapter."""


class HubError(LoramergeError):
    """The Hub cannot be reached, or refuses what was asked for."""


class IncompatibleError(LoramergeError):
    """Adapters that do not belong together, or that a method cannot take."""


class OutputError(LoramergeError):
    """The result cannot be written where it was asked for."""


class UsageError(LoramergeError):
    """The command is wrong as typed."""

    exit_code = 2


class GateError(LoramergeError):
    """A bound that was asked for was not met."""

    exit_code = 3


def listed(names: list[str], limit: int = 8) -> str:
    """Join names for a message, the first few in full and the rest as a count."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
