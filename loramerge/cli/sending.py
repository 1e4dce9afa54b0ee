"""Results that the command which computes them sends to the Hub as well."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from loramerge.errors import LoramergeError, UsageError
from loramerge.events import Started

if TYPE_CHECKING:
    from loramerge.io._hub_push import Pushed
    from loramerge.retrace import Made

__all__ = ["TOLD", "Sending", "sending"]

# The flags of which all but the first tell how to push.
TOLD = ("push", "private", "create_pr", "message")


class Sending(Struct, frozen=True):
    """Where on the Hub a result is to go, and how."""

    repository: str
    private: bool
    create_pr: bool
    message: str | None

    def check(self) -> None:
        """Raise UsageError for what names no repository, HubError where nobody is logged in."""
        from loramerge.io._hub_push import check_push

        check_push(self.repository)

    def send(self, made: "Made", final: Path, quiet: bool) -> "Pushed":
        """Push what was written; a single file takes along what belongs beside it.

        Where that fails the result is still there, and the error says so.
        """
        from loramerge.cli.progress import progress
        from loramerge.exchange import push
        from loramerge.io._hub_client import limit_silence
        from loramerge.publish import companions
        from loramerge.report import Report

        limit_silence()
        beside = companions(made) if final.is_file() and isinstance(made, Report) else None
        method = made.as_json()["recipe"]["method"]
        try:
            with progress(quiet) as listen:
                listen(Started("sending to the Hub", 0))
                return push(
                    str(final),
                    self.repository,
                    private=self.private,
                    create_pr=self.create_pr,
                    message=self.message or f"{method}, made with loramerge",
                    beside=beside,
                )
        except LoramergeError as error:
            hint = f"{error.hint}; " if error.hint else ""
            again = shlex.join(self._words(final))
            raise type(error)(
                error.message, f"{hint}the result is in {final}, to send it: {again}"
            ) from None

    def _words(self, final: Path) -> list[str]:
        told = ["--private"] if self.private else []
        told += ["--create-pr"] if self.create_pr else []
        told += ["-m", self.message] if self.message else []
        return ["loramerge", "push", str(final), self.repository, *told]


def sending(
    name: str, push: str | None, private: bool, create_pr: bool, message: str | None
) -> Sending | None:
    """What --push asks for. Raises UsageError where flags tell how to push, and none where to."""
    if push is not None:
        return Sending(push, private, create_pr, message)
    asked = {"--private": private, "--create-pr": create_pr, "--message": message}
    if given := [flag for flag, value in asked.items() if value]:
        raise UsageError(
            f"{name}: {', '.join(given)} is about a push, and there is none.",
            "say where to: --push user/repo",
        )
    return None
