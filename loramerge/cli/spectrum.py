"""What `inspect --spectrum` shows of an adapter: in the terminal, as JSON, as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramerge.cli.terminal import bars
from loramerge.errors import UsageError

if TYPE_CHECKING:
    from loramerge.adapter import Adapter
    from loramerge.events import Listener

__all__ = ["plot", "plot_place", "spectrum_of", "table"]

# The share of energy that a module's rank is told for, and how many singular values are drawn.
MOST, WIDEST = 0.99, 64


def spectrum_of(adapter: "Adapter", listen: "Listener") -> dict[str, Any]:
    """What each rank keeps of the whole, and the singular values of each module."""
    from loramerge.compute import own_process
    from loramerge.io._hub import fetch
    from loramerge.spectra import needed, spectra, stable_rank

    own_process()
    fetch([adapter], listen)
    found = spectra(adapter, listen)
    return {
        "energy": {str(rank): found.energy(rank) for rank in found.ranks()},
        "modules": {
            name: {
                "singular_values": list(values),
                "stable_rank": stable_rank(values),
                "rank_99": needed(values, MOST),
            }
            for name, values in found.modules.items()
        },
    }


def plot_place(asked: str | None, count: int, force: bool) -> Path | None:
    """Where the picture goes. Raises UsageError for what is no picture of one adapter."""
    from loramerge.io._write import check_text

    if asked is None:
        return None
    place = Path(asked).expanduser()
    if place.suffix.lower() != ".svg":
        raise UsageError(
            f"inspect: --plot-file draws SVG, not {asked}.", "for example: --plot-file spectra.svg"
        )
    if count > 1:
        raise UsageError("inspect --plot-file draws one adapter.", "name one of them")
    check_text(place, force)
    return place


def plot(place: Path, modules: Mapping[str, Any], force: bool) -> None:
    """Draw a curve for each module, beside its largest singular value."""
    from loramerge.drawing import curves
    from loramerge.io._write import write_text

    lines = {}
    for name, one in modules.items():
        values = one["singular_values"]
        highest = values[0] if values and values[0] else 1.0
        lines[name] = [value / highest for value in values]
    write_text(place, curves(lines, "share of the largest singular value", "singular value"), force)


def table(modules: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The columns' names, and a row for each module."""
    rows = [
        [
            name,
            bars(one["singular_values"][:WIDEST]),
            f"{one['stable_rank']:.2f}",
            str(one["rank_99"]),
        ]
        for name, one in modules.items()
    ]
    return ["module", "singular values", "stable rank", "99 %"], rows
