"""The JSON schema of a recipe, the settings of every installed method included: for editors, and for the docs."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from compress.recipe import STRINGS_SCHEMA, Calibration, Evaluation, Model, Output, Recipe


def json_schema() -> dict[str, Any]:
    """A schema (draft 2020-12) that accepts what `Recipe.from_dict` accepts, cross-checks between fields aside."""
    from compress.methods import find, names

    methods = {name: find(name) for name in names()}
    sections = (Model, Calibration, Evaluation, Output)
    models: list[type[BaseModel]] = [*sections, *(method.Config for method in methods.values())]
    refs, definitions = models_json_schema([(model, "validation") for model in models], ref_template="#/$defs/{model}")
    ref = {model: refs[model, "validation"] for model in models}
    defs = definitions["$defs"]
    short = [{"type": "string", "minLength": 1}, {"const": False}]
    defs["Output"]["properties"]["push_to_hub"]["anyOf"] += short
    properties: dict[str, dict[str, Any]] = {
        "model": {"anyOf": [{"type": "string", "minLength": 1}, ref[Model]]},
        "calibration": {"anyOf": [ref[Calibration], {"type": "null"}]},
        "steps": {
            "type": "array",
            "minItems": 1,
            "items": {"anyOf": [_step(name, method.summary, ref[method.Config]) for name, method in methods.items()]},
        },
        "evaluation": {"anyOf": [{"const": False}, ref[Evaluation], {"type": "null"}]},
        "output": {"anyOf": [ref[Output], {"type": "null"}]},
        "seed": {"type": "integer", "minimum": 0, "default": 0},
    }
    for name, schema in properties.items():
        description = Recipe.model_fields[name].description
        if description:
            schema["description"] = description
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "compress recipe",
        "type": "object",
        "additionalProperties": False,
        "required": ["model", "steps"],
        "properties": properties,
        "$defs": defs,
    }


def _step(name: str, summary: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "title": name,
        "additionalProperties": False,
        "required": [name],
        "properties": {
            name: {"description": summary, "anyOf": [settings, {"type": "null"}]},
            "layers": {"description": "patterns of the layers [default: every linear of the blocks]", **STRINGS_SCHEMA},
            "skip": {"description": "patterns of layers to leave out", **STRINGS_SCHEMA},
            "overrides": {
                "description": "pattern: settings that differ for these layers",
                "type": "object",
                "additionalProperties": settings,
            },
        },
    }
