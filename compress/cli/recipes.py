"""`compress recipes`."""

from __future__ import annotations

from typing import Annotated

import typer

from compress.cli.options import Debug, Json

Name = Annotated[str | None, typer.Argument(metavar="NAME", help="print this recipe")]
Schema = Annotated[bool, typer.Option("--schema", help="print the JSON schema of recipes, for editors")]


def recipes(name: Name = None, schema: Schema = False, as_json: Json = False, debug: Debug = False) -> None:
    """List the recipes that come with the package, or print one of them to start from.

    \b
    Example:  compress recipes gptq-4bit > my.yaml
    """
    from compress import shipped
    from compress.cli.show import out, print_json, show, table

    if schema:
        from compress.recipe_schema import json_schema

        print_json(json_schema())
    elif name is not None:
        from compress.recipe import Recipe, find_recipe

        path = find_recipe(name)
        if as_json:
            print_json(Recipe.load(path).to_dict())
        else:
            out(path.read_text(encoding="utf-8").rstrip("\n"))
    else:
        found = {stem: (str(path), shipped.recipe_summary(path)) for stem, path in shipped.recipes().items()}
        if as_json:
            print_json([{"name": n, "path": path, "summary": summary} for n, (path, summary) in found.items()])
        else:
            show(
                table(("recipe", "what it gives"), [(n, first_sentence(summary)) for n, (_, summary) in found.items()])
            )


def first_sentence(text: str) -> str:
    """For a list: the recipe itself has the rest."""
    first, stop, _ = text.partition(". ")
    return first + stop.strip()
