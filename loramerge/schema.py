"""The JSON Schema of recipe files, for editors: drawn from the declarations of all methods."""

from collections.abc import Mapping
from typing import Any

import msgspec

from loramerge.options import Options, describe
from loramerge.recipe import fixed, options_of, settings_of
from loramerge.registry import Method, Preset, layout_names, methods
from loramerge.steps import KINDS, Kind
from loramerge.workflow import NAME, OF_FILE, OF_STEP

__all__ = ["recipe_schema"]

REFERENCE = "A path, a reference to the Hub, or the name of an earlier step."
ADAPTER: Mapping[str, Any] = {
    "anyOf": [
        {"type": "string", "description": REFERENCE},
        {
            "type": "object",
            "properties": {
                "reference": {"type": "string", "description": REFERENCE},
                "weight": {"type": "number", "description": "Its weight; may be negative."},
                "alpha": {
                    "type": "number",
                    "exclusiveMinimum": 0,
                    "description": "lora_alpha of a bare file that does not say it.",
                },
                "from": {
                    "enum": list(layout_names()),
                    "description": "The layout it is in, where its keys are not to tell it.",
                },
            },
            "required": ["reference"],
            "additionalProperties": False,
        },
    ]
}
STEP: Mapping[str, Any] = {
    "name": {
        "type": "string",
        "pattern": f"^{NAME.pattern}$",
        "description": "How a later step names the result of this one.",
    },
    "adapters": {
        "anyOf": [
            {"$ref": "#/definitions/adapter"},
            {"type": "array", "items": {"$ref": "#/definitions/adapter"}, "minItems": 1},
        ],
        "description": "What the method is given.",
    },
    "output": {
        "type": "string",
        "description": "Where the result goes: a directory, or one file that ends in .safetensors.",
    },
}
FILE: Mapping[str, Any] = {
    "output": {"type": "string", "description": "Where the result of the last step goes."},
    "base_model": {
        "type": "string",
        "description": "The base model that every adapter must be for, where it names one.",
    },
    "$schema": {"type": "string"},
}


def recipe_schema() -> dict[str, Any]:
    """One step, or several under `steps`; which options there are depends on the method."""
    declared = {method.options for method in methods().values()}
    declared |= {settings_of(method) for method in methods().values()}
    declared |= {kind.options for kind in KINDS.values()}
    options = {
        one.__name__: _options(one) for one in sorted(declared, key=lambda one: one.__name__)
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A recipe for loramerge run",
        "type": "object",
        "properties": {
            **FILE,
            "steps": {
                "type": "array",
                "minItems": 1,
                "items": _step(OF_STEP),
                "description": "Methods, one after another.",
            },
        },
        "if": {"required": ["steps"]},
        "then": {"propertyNames": {"enum": list(OF_FILE)}},
        "else": _step(tuple(dict.fromkeys((*OF_STEP, *FILE)))),
        "definitions": {"adapter": ADAPTER, **options},
    }


def _step(keys: tuple[str, ...]) -> dict[str, Any]:
    """A step; `keys` are what it may hold besides the options of its method."""
    kinds = [(name, kind.summary, _of_kind(kind, keys)) for name, kind in KINDS.items()]
    for method in methods().values():
        kinds.append((method.name, method.summary, _of_method(method, None, keys)))
        kinds += [(one.name, one.summary, _of_method(method, one, keys)) for one in method.presets]
    return {
        "type": "object",
        "required": ["method"],
        "properties": {
            **STEP,
            "method": {"oneOf": [{"const": name, "description": said} for name, said, _ in kinds]},
        },
        "allOf": [
            {
                "if": {"properties": {"method": {"const": name}}, "required": ["method"]},
                "then": held,
            }
            for name, _, held in kinds
        ],
    }


def _of_method(method: Method, preset: Preset | None, keys: tuple[str, ...]) -> dict[str, Any]:
    """The options of a method, and no other keys."""
    taken = [option.key for option in options_of(method) if option.name not in fixed(preset)]
    declared = (method.options, settings_of(method))
    return {
        "required": ["adapters"],
        "allOf": [{"$ref": f"#/definitions/{one.__name__}"} for one in declared],
        "propertyNames": {"enum": [*keys, *taken]},
    }


def _of_kind(kind: Kind, keys: tuple[str, ...]) -> dict[str, Any]:
    """What a command that is no method takes, and no other keys."""
    taken = [option.key for option in describe(kind.options)]
    held = [key for key in keys if key != "adapters" or key in kind.needs]
    return {
        "required": list(kind.needs),
        "allOf": [{"$ref": f"#/definitions/{kind.options.__name__}"}],
        "propertyNames": {"enum": [*held, *taken]},
    }


def _options(declared: type[Options]) -> dict[str, Any]:
    """What each option of a declaration may be, by its key."""
    properties = msgspec.json.schema(declared)["$defs"][declared.__name__]["properties"]
    found: dict[str, Any] = {}
    for option in describe(declared):
        value = dict(properties[option.name])
        value.pop("description", None)
        if option.repeated:
            value = {"anyOf": [value, value["items"]]}
        elif option.name == "to" and option.default is None:
            value = {"enum": list(layout_names())}
        elif option.name == "size":
            value = {"anyOf": [value, {"type": "integer", "minimum": 1}]}
        found[option.key] = {**value, "description": option.description}
    return {"properties": found}
