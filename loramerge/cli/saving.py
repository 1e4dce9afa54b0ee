"""--save-recipe: a command line as a recipe file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loramerge.io._yaml import Value

__all__ = ["save_recipe"]


def save_recipe(place: str | None, steps: Sequence[Mapping[str, "Value"]], force: bool) -> None:
    """Write the recipe of one or several steps down, where one was asked for.

    Raises OutputError where something stands there and `force` is not set.
    """
    if place is None:
        return
    from loramerge.document import steps_document
    from loramerge.io._write import write_text
    from loramerge.io._yaml import write_yaml

    write_text(Path(place).expanduser(), write_yaml(steps_document(steps)), force)
