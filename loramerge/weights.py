"""How much of each adapter goes into each module: its --weight, times every --module-weight."""

import math
import re

from msgspec import Struct

from loramerge.errors import UsageError
from loramerge.patterns import matches

__all__ = ["EXAMPLE", "EXPECTED", "ModuleWeight", "Weights", "check_places", "module_weight"]

FORM = re.compile(r"(?:([0-9]{1,9}):)?+(.+)=([^=]+)", re.DOTALL)
EXPECTED = "[N:]GLOB=X with a finite number X"
EXAMPLE = "--module-weight 'layers.0-7.*=0.5'"


class ModuleWeight(Struct, frozen=True):
    """A factor on the weight of one adapter, or of all, in the modules that match a glob.

    `text` is as it was typed; `adapter` is a place from 0 on, None for all adapters.
    """

    text: str
    glob: str
    factor: float
    adapter: int | None = None

    @property
    def frame(self) -> str:
        """What was typed around the glob: 2:{}=0.5."""
        head, _, factor = self.text.rpartition("=")
        return f"{head.removesuffix(self.glob)}{{}}={factor}"

    def factor_at(self, adapter: int, name: str) -> float:
        """The factor on the weight of one adapter in one module; 1 where neither is meant."""
        meant = self.adapter in (None, adapter) and matches(name, self.glob)
        return self.factor if meant else 1.0


class Weights(Struct, frozen=True):
    """The --weight of each adapter and every --module-weight; factors that meet multiply."""

    adapters: tuple[float, ...]
    modules: tuple[ModuleWeight, ...] = ()

    def at(self, name: str) -> tuple[float, ...]:
        """The weight of each adapter in one module."""
        return tuple(
            weight * math.prod(one.factor_at(place, name) for one in self.modules)
            for place, weight in enumerate(self.adapters)
        )


def module_weight(text: str) -> ModuleWeight:
    """[N:]GLOB=X, taken apart. Raises UsageError for any other form."""
    found = FORM.fullmatch(text)
    factor = _finite(found[3]) if found else None
    if found is None or factor is None:
        raise UsageError(
            f"--module-weight is {text!r}; it must be {EXPECTED}.", f"for example: {EXAMPLE}"
        )
    return ModuleWeight(text, found[2], factor, int(found[1]) - 1 if found[1] else None)


def check_places(weights: Weights) -> None:
    """Raise UsageError for a --module-weight whose N is beyond the adapters."""
    count = len(weights.adapters)
    for one in weights.modules:
        if one.adapter is not None and not 0 <= one.adapter < count:
            number, _, rest = one.text.partition(":")
            raise UsageError(
                f"--module-weight '{one.text}' is for adapter {number} of {count}.",
                f"for example: --module-weight '{count}:{rest}'",
            )


def _finite(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
