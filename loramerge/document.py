"""Recipe files as documents: one value of it set, a command line written as one."""

import re
from collections.abc import Mapping, Sequence

from loramerge.errors import UsageError
from loramerge.io._yaml import Value
from loramerge.recipe import Named
from loramerge.steps import step_options

__all__ = ["assign", "recipe_document", "steps_document"]

PART = re.compile(r"[A-Za-z_$][\w$-]*|\d+")
PATH = re.compile(r"[A-Za-z_$][\w$-]*(\.[A-Za-z_$][\w$-]*|\[\d+\])*")


def assign(found: Value, path: str, value: Value) -> None:
    """Set one value of a document: rank, adapters[0].weight, steps[1].density.

    Raises UsageError where the path leads nowhere.
    """
    parts = _parts(path)
    node, so_far = found, "$"
    for position, part in enumerate(parts):
        last = position == len(parts) - 1
        so_far += f"[{part}]" if isinstance(part, int) else f".{part}"
        if isinstance(part, int) and isinstance(node, list) and part < len(node):
            if last:
                node[part] = value
            elif isinstance(node[part], str):
                node[part] = {"reference": node[part]}
            node = node[part]
        elif isinstance(part, str) and isinstance(node, dict) and (last or part in node):
            if last:
                node[part] = value
            node = node[part]
        else:
            raise UsageError(
                f"--set {path}: the recipe has no {so_far}.", "for example: --set steps[1].rank=8"
            )


def _parts(path: str) -> list[str | int]:
    text = path.removeprefix("$.")
    if not PATH.fullmatch(text):
        raise UsageError(f"--set {path} is no key.", "for example: --set steps[1].rank=8")
    return [int(part) if part.isdigit() else part for part in PART.findall(text)]


def recipe_document(
    method: str, adapters: Sequence[Named], values: Mapping[str, object], output: str | None
) -> dict[str, Value]:
    """The recipe file of one command."""
    listed: list[Value] = []
    for named in adapters:
        facts: dict[str, Value] = {
            "weight": named.weight if named.weight != 1 else None,
            "alpha": named.alpha,
            "from": named.layout,
        }
        said = {key: fact for key, fact in facts.items() if fact is not None}
        listed.append({"reference": named.reference, **said} if said else named.reference)
    keys = {option.name: option.key for option in step_options(method)}
    flat = {keys.get(name, name): _plain(value) for name, value in values.items()}
    inputs = {"adapters": listed} if listed else {}
    return {"method": method, **inputs, **flat, **({"output": output} if output else {})}


def steps_document(steps: Sequence[Mapping[str, Value]]) -> dict[str, Value]:
    """The recipe file of steps: of one alone, what it holds."""
    return dict(steps[0]) if len(steps) == 1 else {"steps": [dict(step) for step in steps]}


def _plain(value: object) -> Value:
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, bool | int | float | None) else str(value)
