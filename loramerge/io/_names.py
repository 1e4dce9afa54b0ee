"""Module names from one vocabulary into another."""

from loramerge.adapter import Adapter
from loramerge.errors import IncompatibleError

__all__ = ["renamed"]


def renamed(adapter: Adapter, naming: str) -> Adapter:
    """The same adapter with module names of another vocabulary.

    Raises IncompatibleError where a name has no counterpart there.
    """
    if adapter.naming == naming:
        return adapter
    raise IncompatibleError(
        f"{adapter.reference}: its module names ({adapter.naming}) cannot be translated into those "
        f"of {naming} yet.",
        "give adapters of one layout, and leave --to out",
    )
