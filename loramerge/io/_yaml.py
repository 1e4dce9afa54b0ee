"""YAML 1.2 as people write it by hand: plain data, nothing that a reader could trip over.

Scalars are read by the core schema of YAML 1.2, where 1e-3 is a number and `no` a word. Keys are
text and stand once. Anchors, aliases, tags and several documents are refused. JSON is YAML.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

from loramerge._lazy import yaml
from loramerge.errors import UsageError

__all__ = ["Value", "read_text", "read_yaml", "write_yaml"]

Value: TypeAlias = "bool | int | float | str | list[Value] | dict[str, Value] | None"

# Bytes; a recipe of a thousand adapters has half of it.
LARGEST = 200_000
DEEPEST = 32
WORDS: Mapping[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
INT = re.compile(r"[-+]?[0-9]{1,4000}")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
# Text that needs no quotes, wherever it stands.
PLAIN = re.compile(r"[A-Za-z./~_][\w./~@+*-]*(:[\w./~@+*-]+)*", re.ASCII)


def read_text(path: Path) -> str:
    """The text of a file that people write. Raises UsageError for one that cannot be read."""
    try:
        if path.stat().st_size > LARGEST:
            raise UsageError(f"{path} is larger than {LARGEST:,} bytes.", "name a recipe")
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UsageError(f"{path} cannot be read: {reason}.", f"see: ls {path.parent}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not text (UTF-8).", "name a recipe, in YAML or JSON") from None


def read_yaml(text: str, where: str) -> Value:
    """The data of a YAML or JSON text; `where` names it in errors.

    Raises UsageError with the line for what is no YAML, or more of it than plain data.
    """
    try:
        value = _json(text, where)
    except (ValueError, RecursionError):
        value = _yaml(text, where)
    try:
        # Half a surrogate pair can be neither printed nor written.
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _refused(where, None, "text with half a surrogate pair") from None
    return value


def _refused(where: str, line: int | None, what: str) -> UsageError:
    place = where if line is None else f"{where}, line {line + 1}"
    return UsageError(f"{place}: {what}.", "see the examples in docs/recipes.md")


def _unique(pairs: list[tuple[str, Value]], where: str, line: int | None) -> dict[str, Value]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise _refused(where, line, f"'{twice}' is given twice")
    return found


def _json(text: str, where: str) -> Value:
    """The data of a JSON text. Raises ValueError or RecursionError where it is none."""

    def none(word: str) -> Value:
        raise ValueError(word)

    value: Value = json.loads(
        text, object_pairs_hook=lambda pairs: _unique(pairs, where, None), parse_constant=none
    )
    return value


def _yaml(text: str, where: str) -> Value:
    try:
        return _document(text, where)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or getattr(error, "reason", "not text")
        raise _refused(where, mark.line if mark else None, f"no YAML: {what}") from None


def _document(text: str, where: str) -> Value:
    """The one document of a text, built from parse events without recursion."""
    found: list[Value] = []
    # What is open: its items, keys and values in turn for a mapping, and the line of a mapping.
    nested: list[tuple[list[Value], int | None]] = [(found, None)]
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line if event.start_mark else 0
        items, mapping = nested[-1]
        is_key = mapping is not None and len(items) % 2 == 0
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _refused(where, line, "anchors (&) and aliases (*) are not taken; write it out")
        if tag := getattr(event, "tag", None):
            raise _refused(where, line, f"tags ({tag}) are not taken")
        if isinstance(event, yaml.ScalarEvent):
            items.append(event.value if is_key else _scalar(event))
        elif isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            if is_key:
                raise _refused(where, line, "a list or a mapping cannot be a key")
            if len(nested) > DEEPEST:
                raise _refused(where, line, f"deeper than {DEEPEST} levels")
            nested.append(([], line if isinstance(event, yaml.MappingStartEvent) else None))
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            nested.pop()
            nested[-1][0].append(items if mapping is None else _mapping(items, where, mapping))
        elif isinstance(event, yaml.DocumentStartEvent) and found:
            raise _refused(where, line, "a second document (---) is not taken")
    return found[0] if found else None


def _mapping(items: list[Value], where: str, line: int) -> dict[str, Value]:
    pairs = iter(items)
    return _unique([(str(key), next(pairs)) for key in pairs], where, line)


def _scalar(event: "yaml.ScalarEvent") -> Value:
    """A scalar by the core schema; what is quoted is text."""
    text: str = event.value
    if event.style is not None:
        return text
    if text in WORDS:
        return WORDS[text]
    if INT.fullmatch(text):
        return int(text)
    return float(text) if FLOAT.fullmatch(text) else text


def write_yaml(document: Mapping[str, Value]) -> str:
    """A document as YAML that `read_yaml` reads back the same; empty lists and mappings inline."""
    return "".join(f"{line}\n" for line in _lines(document))


def _lines(value: "Value | Mapping[str, Value]") -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            if isinstance(inner, list | dict) and inner:
                yield f"{_written(key)}:"
                yield from (f"  {line}" for line in _lines(inner))
            else:
                yield f"{_written(key)}: {_written(inner)}"
    elif isinstance(value, list) and value:
        for inner in value:
            first, *rest = _lines(inner)
            yield f"- {first}"
            yield from (f"  {line}" for line in rest)
    else:
        yield _written(value)


def _written(value: "Value | Mapping[str, Value]") -> str:
    if isinstance(value, str) and PLAIN.fullmatch(value) and value not in WORDS:
        return value if not FLOAT.fullmatch(value) else json.dumps(value)
    return json.dumps(value, ensure_ascii=False)
