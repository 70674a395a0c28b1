"""`compress methods`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli.options import Debug, Json

if TYPE_CHECKING:
    from compress.methods.base import SiteMethod
    from compress.methods.rewrite import ModelMethod
    from compress.methods.tuning import TuningMethod

OURS = "compress-llm"
Name = Annotated[
    str | None, typer.Argument(metavar="NAME", help="show the settings and the mathematics of this method")
]


def methods(name: Name = None, as_json: Json = False, debug: Debug = False) -> None:
    """List the methods that a recipe can name, those of installed plug-ins included; or show one with its settings.

    \b
    Example:  compress methods gptq
    """
    from compress.cli.show import note, print_json, show, table
    from compress.errors import RecipeError
    from compress.methods import find, names

    if name is not None:
        described = describe(find(name), packages().get(name, OURS))
        print_json(described) if as_json else _print_one(described)
        return
    found, broken = [], []
    for each in names():
        try:
            found.append(describe(find(each), packages().get(each, OURS)))
        except RecipeError as error:  # a plug-in that cannot be imported must not hide the others
            broken.append(str(error))
    if as_json:
        print_json(found)
    else:
        rows = [(m["name"], m["summary"], m["kind"], m["needs_data"], m["package"]) for m in found]
        show(table(("method", "what it does", "works on", "needs data", "package"), rows))
    for message in broken:
        note(f"warning: {message}")


def packages() -> dict[str, str]:
    """Method -> the outside package that it comes from."""
    from importlib.metadata import entry_points

    from compress.methods import ENTRY_POINTS, METHODS

    points = entry_points(group=ENTRY_POINTS)
    return {p.name: p.dist.name if p.dist else p.value for p in points if p.name not in METHODS}


def describe(method: type[SiteMethod] | type[ModelMethod] | type[TuningMethod], package: str) -> dict[str, Any]:
    """A method for JSON: what it is, and its settings from its config."""
    import inspect
    import sys

    from compress.methods.base import SiteMethod
    from compress.methods.tuning import TuningMethod

    schema = method.Config.model_json_schema()
    required = schema.get("required", [])
    settings = {}
    for name, field in schema.get("properties", {}).items():
        settings[name] = {
            "type": _type(field),
            "range": _range(field),
            "required": name in required,
            "default": field.get("default"),
            "description": field.get("description", ""),
        }
    doc = sys.modules[method.__module__].__doc__
    return {
        "name": method.name,
        "summary": method.summary,
        "kind": "layers"
        if issubclass(method, SiteMethod)
        else "the result"
        if issubclass(method, TuningMethod)
        else "the model",
        "needs_data": _needs_data(method),
        "package": package,
        "settings": settings,
        "documentation": inspect.cleandoc(doc) if doc else "",
    }


def _needs_data(method: type[SiteMethod] | type[ModelMethod] | type[TuningMethod]) -> str:
    from pydantic import ValidationError

    try:
        return "yes" if method.needs_tokens(method.Config()) else "no"
    except ValidationError:
        return "as set"  # some setting has no default


def _type(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join("none" if kind.get("type") == "null" else _type(kind) for kind in field["anyOf"])
    if "enum" in field:
        return ", ".join(str(value) for value in field["enum"])
    if "const" in field:
        return str(field["const"])
    return {"integer": "whole number", "number": "number", "boolean": "true, false", "string": "text"}.get(
        field.get("type", ""), field.get("type", "any")
    )


def _range(field: dict[str, Any]) -> str:
    for kind in [field, *field.get("anyOf", [])]:
        low = next(
            (f"{sign} {kind[key]}" for key, sign in (("minimum", ">="), ("exclusiveMinimum", ">")) if key in kind), ""
        )
        high = next(
            (f"{sign} {kind[key]}" for key, sign in (("maximum", "<="), ("exclusiveMaximum", "<")) if key in kind), ""
        )
        if low or high:
            return ", ".join(filter(None, [low, high]))
    return ""


def _print_one(described: dict[str, Any]) -> None:
    from compress.cli.show import out, show, table

    out(f"{described['name']}: {described['summary']}  [{described['package']}]\n")
    rows = []
    for name, setting in described["settings"].items():
        default = "must be given" if setting["required"] else _written(setting["default"])
        rows.append((name, setting["type"], setting["range"], default, setting["description"]))
    show(table(("setting", "values", "range", "default", "what it does"), rows))
    out(f"\nIn a recipe:\n\n  steps:\n    - {described['name']}: {{{_example(described['settings'])}}}\n")
    if described["documentation"]:
        out(described["documentation"])


def _example(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}: {_written(setting['default'])}" for name, setting in list(settings.items())[:2])


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
