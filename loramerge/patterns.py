"""Globs on module names, in which a range stands for the layers whose numbers lie in it."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from loramerge.errors import UsageError
from loramerge.options import did_you_mean

__all__ = ["check_match", "matches"]

# A range is a whole part of a name: layers.0-7. or blocks_0-7_, but not the class in [0-7].
RANGE = re.compile(r"(?<![^._])([0-9]{1,9})-([0-9]{1,9})(?![^._])")
NUMBER = re.compile(r"(?<![0-9])[0-9]{1,9}(?![0-9])")


def matches(name: str, glob: str) -> bool:
    """Whether a glob matches the whole name, case and all; 0-7 in it is any number from 0 to 7."""
    found = RANGE.search(glob)
    if found is None:
        return fnmatchcase(name, glob)
    low, high = int(found[1]), int(found[2])
    return any(
        matches(name, glob[: found.start()] + number + glob[found.end() :])
        for number in set(NUMBER.findall(name))
        if low <= int(number) <= high
    )


def check_match(glob: str, names: Sequence[str], said: str, typed: str = "{}") -> None:
    """Raise UsageError where a glob matches none of the names, with one that would.

    `said` is the sentence without its end: --include 'q_prj' matches no module. `typed` is what
    stands around the glob: 2:{}=0.5.
    """
    if any(matches(name, glob) for name in names):
        return
    close = _close(glob, names)
    example = f"a module is called '{names[0]}'" if names else "leave it out"
    meant = f"did you mean '{typed.replace('{}', close)}'?" if close else example
    raise UsageError(f"{said}.", meant)


def _close(glob: str, names: Sequence[str]) -> str | None:
    plain = glob.strip("*.")
    leaves = {name.rpartition(".")[2] for name in names}
    if plain in leaves:
        return f"*.{plain}"
    turned = RANGE.sub(lambda found: "-".join(sorted(found.groups(), key=int)), glob)
    for wider in (turned, f"*{turned}", f"{turned}*", f"*{turned}*"):
        if any(matches(name, wider) for name in names):
            return wider
    leaf = did_you_mean(plain, leaves)
    return f"*.{leaf}" if leaf else did_you_mean(glob, names)
