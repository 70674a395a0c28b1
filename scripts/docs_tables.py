"""The parts of README.md and docs/ that follow from the code: tables of fields, settings, options, families, recipes.

A part stands between `<!-- generated: KIND NAME -->` and `<!-- end -->`. The tests hold it to the code.

    python scripts/docs_tables.py              # write them anew
    python scripts/docs_tables.py --check      # say which are stale, and fail
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PART = re.compile(r"(<!-- generated: (\w+)(?: ([\w-]+))? -->\n).*?(<!-- end -->)", re.DOTALL)
SCHEMA = ROOT / "docs" / "recipe.schema.json"
REPORT_SCHEMA = ROOT / "docs" / "report.schema.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if something is stale")
    check = parser.parse_args().check
    stale = 0
    for file, text in current().items():
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            stale += 1
            print(f"{file.relative_to(ROOT)}: {'is stale' if check else 'written'}")
            if not check:
                file.write_text(text, encoding="utf-8")
    return 1 if check and stale else 0


def current() -> dict[Path, str]:
    """Every generated file, and every page with its generated parts, as the code wants them."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    found = {page: PART.sub(_part, page.read_text(encoding="utf-8")) for page in pages}
    return {**found, SCHEMA: schema(), REPORT_SCHEMA: report_schema()}


def _part(match: re.Match[str]) -> str:
    before, kind, name, after = match.groups()
    lines = PARTS[kind]() if name is None else PARTS[kind](name)
    return "".join([before, *(f"{line}\n" for line in lines), after])


def schema() -> str:
    """The JSON schema of recipes, for editors."""
    from compress.recipe_schema import json_schema

    return json.dumps(json_schema(), indent=1) + "\n"


def report_schema() -> str:
    """The JSON schema of reports."""
    from compress.report.schema import json_schema

    return json.dumps(json_schema(), indent=1) + "\n"


KINDS = {"integer": "whole number", "number": "number", "boolean": "`true`, `false`", "string": "text"}


def section(name: str) -> Iterable[str]:
    """The fields of a section of the recipe."""
    import compress.recipe

    return _fields(getattr(compress.recipe, name).model_json_schema() if name != "Recipe" else _recipe())


def _recipe() -> dict[str, Any]:
    from compress.recipe_schema import json_schema

    content = json_schema()
    kinds = {"model": "text or section", "steps": "list", "evaluation": "section or false"}
    fields = {}
    for key, field in content["properties"].items():
        kind = kinds.get(key, "whole number" if key == "seed" else "section")
        fields[key] = {"description": "see below", "default": {}, **field, "kind": kind}
    for key in ("calibration", "output"):
        fields[key]["description"] = SECTIONS[key]
    fields["evaluation"] = {**fields["evaluation"], "default": False}
    return {"properties": fields, "required": content["required"]}


SECTIONS = {
    "calibration": "the tokens whose activations the methods see",
    "output": "where the result goes, and as what",
}


def method(name: str) -> Iterable[str]:
    """The settings of a method."""
    from compress.methods import find

    return _fields(find(name).Config.model_json_schema())


def _fields(content: dict[str, Any]) -> Iterable[str]:
    yield "| field | type | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in content["properties"].items():
        meaning, said = _apart(field.get("description", ""))
        default = said or _default(field.get("default"))
        if name in content.get("required", ()):
            default = "required"
        yield f"| `{name}` | {field.get('kind') or _type(field)} | {_cell(default)} | {_cell(meaning)} |"


def _default(value: Any) -> str:
    if value is None or value == {}:
        return "–"
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def _type(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        kinds = dict.fromkeys(_type(kind) for kind in field["anyOf"] if kind.get("type") != "null")
        return " or ".join(kinds)
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if field.get("type") == "array":
        return "list"
    if "$ref" in field:
        return "section"
    kind = KINDS[field["type"]]
    low = [f"{sign} {field[key]}" for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">")) if key in field]
    high = [f"{sign} {field[key]}" for key, sign in (("maximum", "≤"), ("exclusiveMaximum", "<")) if key in field]
    return " ".join([kind, ", ".join([*low, *high])]).strip()


def verb(name: str) -> Iterable[str]:
    """The arguments and options of a verb of the command line."""
    import typer

    from compress.cli.main import app

    commands: Any = typer.main.get_command(app)
    yield "| option | default | meaning |"
    yield "|---|---|---|"
    for parameter in sorted(commands.commands[name].params, key=lambda p: p.param_type_name != "argument"):
        if "--help" not in parameter.opts:
            meaning, _ = _apart(parameter.help or "")
            yield f"| {_written(parameter)} | {_option_default(parameter)} | {_cell(meaning)} |"


def _written(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{(parameter.metavar or parameter.name.upper()).strip('[]{}')}`"
    names = [*parameter.secondary_opts, *parameter.opts] if parameter.secondary_opts else parameter.opts
    names = sorted(names, key=lambda option: (option.startswith("--no-"), not option.startswith("--")))
    value = "" if parameter.is_flag else f" {parameter.metavar or names[0].rpartition('-')[2].upper()}"
    return ", ".join(f"`{option}{value if option.startswith('--') else ''}`" for option in names).replace("|", "\\|")


def _apart(text: str) -> tuple[str, str | None]:
    """What a description says, and the default that it names in brackets."""
    text = " ".join(text.split())
    found = re.fullmatch(r"(.*?)\s*\[default: (.*)\]", text)
    return (found[1], found[2]) if found else (text, None)


def _option_default(parameter: Any) -> str:
    said = _apart(parameter.help or "")[1]
    if said:
        return _cell(said)
    if parameter.required:
        return "required"
    if parameter.default is None or parameter.is_flag or not isinstance(parameter.default, str | int | float):
        return "–"
    return f"`{parameter.default}`"


def verbs() -> Iterable[str]:
    """The verbs, a line each."""
    import typer

    from compress.cli.main import app

    commands: Any = typer.main.get_command(app)
    yield "| verb | what it does |"
    yield "|---|---|"
    for name, command in commands.commands.items():
        said = command.short_help or command.get_short_help_str(200)
        yield f"| [`{name}`](#compress-{name}) | {_cell(said)} |"


def families() -> Iterable[str]:
    """The families of models that can be compressed."""
    from compress.models.families import known_families

    yield "| family | `model_type` |"
    yield "|---|---|"
    for model_type, title in known_families().items():
        yield f"| {title} | `{model_type}` |"


def recipes() -> Iterable[str]:
    """The recipes that ship."""
    from compress import shipped

    yield "| recipe | what it gives |"
    yield "|---|---|"
    for name, path in shipped.recipes().items():
        first, _, _ = shipped.recipe_summary(path).partition(". ")
        yield f"| [`{name}`](../recipes/{name}.yaml) | {_cell(first.rstrip('.'))} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


PARTS: dict[str, Callable[..., Iterable[str]]] = {
    "section": section,
    "method": method,
    "verb": verb,
    "verbs": verbs,
    "families": families,
    "recipes": recipes,
}

if __name__ == "__main__":
    sys.exit(main())
