"""A verdict on an adapter, and the grounds for one that several programs share."""

import math
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

from msgspec import Struct

from loramerge.adapter import Adapter
from loramerge.errors import listed

__all__ = [
    "BAKE",
    "MAKE_PLAIN",
    "PER_MODULE",
    "Rule",
    "Verdict",
    "another_layout",
    "compared",
    "converting",
    "left_out",
]

State: TypeAlias = Literal["right", "wrong scale", "refused"]
# Scales that differ by less are the same number in another float.
SAME = 1e-6
PER_MODULE = "alpha / rank of each module, as it says"
MAKE_PLAIN = "loramerge cat {0} -o portable"
BAKE = "loramerge bake {0} --base MODEL --rank 16"


class Verdict(Struct, frozen=True):
    """What a program makes of an adapter, the reason, and what to type where it is not right."""

    state: State
    reason: str
    remedy: str = ""


Rule: TypeAlias = Callable[[Adapter, int], Verdict]


def another_layout(adapter: Adapter, wanted: str) -> Verdict:
    """The verdict of a program that reads another layout, and how to get there."""
    reason = f"the {adapter.layout} layout"
    if adapter.variants:
        return Verdict("refused", reason, adapter.variants[0].hint)
    return Verdict("refused", reason, converting(adapter, wanted))


def converting(adapter: Adapter, wanted: str) -> str:
    """What to type for another layout, which has no place for what stands beside the pairs."""
    extras = " --extras drop" if adapter.extras else ""
    return f"loramerge convert {{0}} --to {wanted}{extras}"


def left_out(missed: list[str], adapter: Adapter, reason: str, remedy: str) -> Verdict | None:
    """A verdict where modules are not loaded: as if their scale were 0, and nobody says so."""
    if not missed:
        return None
    state: State = "refused" if len(missed) == len(adapter.modules) else "wrong scale"
    return Verdict(state, reason.format(listed(missed, 2)), remedy)


def compared(
    adapter: Adapter, used: Mapping[str, float], formula: str, remedy: str = MAKE_PLAIN
) -> Verdict:
    """Whether the scales that a program uses, by some formula, are those of the adapter."""
    wrong = [
        name
        for name, module in adapter.modules.items()
        if not math.isclose(module.scaling, used[name], rel_tol=SAME)
    ]
    if not wrong:
        return Verdict("right", f"{formula} is the scale of all {len(used)} modules")
    if not any(used.values()):
        return Verdict("refused", f"{formula} is 0: nothing of it arrives", remedy)
    worst = max(wrong, key=lambda name: abs(math.log(_ratio(used[name], adapter, name))))
    ratio = _ratio(used[worst], adapter, worst)
    return Verdict(
        "wrong scale",
        f"{formula} makes {len(wrong)} of {len(used)} modules wrong, {worst} by {ratio:.3g} times",
        remedy,
    )


def _ratio(used: float, adapter: Adapter, name: str) -> float:
    own = adapter.modules[name].scaling
    return abs(used / own) if own and used else math.inf
