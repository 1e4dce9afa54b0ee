"""The way of a result as a recipe file: its record, in the words that a person writes."""

import os
from collections.abc import Mapping
from pathlib import Path

from loramerge.adapter import Adapter
from loramerge.document import recipe_document, steps_document
from loramerge.errors import LoramergeError, UsageError
from loramerge.io._open import layout, open_adapter
from loramerge.io._yaml import Value
from loramerge.recipe import Named
from loramerge.record import Canonical, Source
from loramerge.retrace import Way
from loramerge.steps import step_options
from loramerge.translation import CONVERT, heads_text

__all__ = ["lineage"]


def lineage(way: Way) -> dict[str, Value]:
    """The recipe that makes a result from its first sources: one step, or several.

    Sources on the Hub are named at their commits, others by where they are from here. Raises
    UsageError where a conversion on the way was kept in another form than a step keeps it in.
    """
    steps: list[dict[str, Value]] = []
    _add(way, steps)
    return steps_document(steps)


def _add(way: Way, steps: list[dict[str, Value]]) -> None:
    """Append the step of a record, after those it needs."""
    recipe = way.record.recipe
    adapters: list[Named] = []
    facts = zip(way.record.sources, way.found, recipe.weights, recipe.alphas, strict=True)
    for source, found, weight, alpha in facts:
        if isinstance(found, Way):
            adapters.append(Named(_named(found, steps), weight))
        else:
            here = _reference(found)
            told = _from(here, alpha, source)
            adapters.append(Named(source.reference or here, weight, alpha, told))
    values = _conversion(way) if recipe.method == CONVERT else recipe.options
    document = recipe_document(recipe.method, adapters, _unusual(recipe, values), None)
    steps.append(document)


def _named(way: Way, steps: list[dict[str, Value]]) -> str:
    """The name of a step that a later one takes. Raises UsageError for a form it never has."""
    recipe = way.record.recipe
    if recipe.method == CONVERT:
        single = not layout(recipe.options["to"]).directory
        if recipe.options.get("single", False) != single:
            kept = "one file" if single else "a directory"
            raise UsageError(
                f"A step of a recipe keeps a conversion to {recipe.options['to']} as {kept}, which "
                "this one was not.",
                "leave out --save-recipe: the record in the header tells of it too",
            )
    _add(way, steps)
    name = f"step{len(steps)}"
    steps[-1] = {"name": name, **steps[-1]}
    return name


def _reference(adapter: Adapter) -> str:
    if adapter.origin is not None:
        return adapter.origin.uri
    path = adapter.source.path
    held = path.parent if path.name == layout(adapter.layout).weights else path
    return os.path.relpath(held, Path.cwd())


def _from(reference: str, alpha: float | None, source: Source) -> str | None:
    """The layout to read a source in, where its keys do not tell it."""
    try:
        told = open_adapter(reference, alpha, look=True).layout
    except LoramergeError:
        return source.layout
    return None if told == source.layout else source.layout


def _conversion(way: Way) -> dict[str, object]:
    """The options of a conversion, from what its record says."""
    said = way.record.recipe.options
    (source,) = way.found
    # A record says "drop" too where there was nothing to carry.
    bare = isinstance(source, Adapter) and not (source.extras or source.tokenizer)
    return {
        "to": said["to"],
        "projections": said.get("projections"),
        "rename": ["=".join(pair) for pair in said.get("renames", ())],
        "heads": heads_text(said["heads"]) if said.get("heads") else None,
        "extras": "error" if said["extras"] == "carry" or bare else "drop",
    }


def _unusual(recipe: Canonical, values: Mapping[str, object]) -> Mapping[str, object]:
    """Every value that is not the default."""
    given = {**values, **recipe.settings}
    options = {option.name: option.default for option in step_options(recipe.method)}
    return {
        name: value
        for name, value in given.items()
        if value not in (None, []) and value != options.get(name)
    }
