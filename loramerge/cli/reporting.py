"""--report: what a run did as a page of its own, beside the result."""

from pathlib import Path
from typing import TYPE_CHECKING

from loramerge.errors import UsageError

if TYPE_CHECKING:
    from loramerge.report import Report

__all__ = ["page_place", "write_page"]

SUFFIXES = (".html", ".htm")


def page_place(name: str, asked: str | None, out_dir: str | None, force: bool) -> Path | None:
    """Where the page goes; checked before anything is computed.

    Raises UsageError for what is no page of one result, OutputError where something stands there.
    """
    from loramerge.io._write import check_text

    if asked is None:
        return None
    if out_dir is not None:
        raise UsageError(f"{name} --report tells of one result.", "leave out --out-dir")
    place = Path(asked).expanduser()
    if place.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"{name}: --report writes HTML, not {asked}.",
            "for example: --report report.html; --json prints JSON",
        )
    check_text(place, force)
    return place


def write_page(place: Path | None, report: "Report", force: bool) -> None:
    """Write the page, where one was asked for."""
    if place is None:
        return
    from loramerge.io._write import write_text
    from loramerge.page import page

    write_text(place, page(report), force)
