"""--save-recipe: a command line as a recipe file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loramerge.io._yaml import Value

__all__ = ["save_recipe"]


def save_recipe(
    asked: str | None,
    steps: Sequence[Mapping[str, "Value"]],
    finals: Sequence[Path],
    force: bool,
) -> None:
    """Write the recipe of one or several steps down, where one was `asked` for.

    Raises UsageError where it would lie in one of the outputs, which are `finals`; OutputError
    where something stands there and `force` is not set.
    """
    if asked is None:
        return
    from loramerge.document import steps_document
    from loramerge.io._write import write_text
    from loramerge.io._yaml import write_yaml
    from loramerge.publish import BESIDE, check_apart

    place = Path(asked).expanduser()
    check_apart([*finals, place], BESIDE)
    write_text(place, write_yaml(steps_document(steps)), force)
