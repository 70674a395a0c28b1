"""`compress tasks`."""

from __future__ import annotations

from typing import Annotated

import typer

from compress.cli.options import Debug, IncludePath, Json

Patterns = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PATTERN", help="names that contain this, or match it where it has * or ? (several may be given)"
    ),
]


def tasks(
    patterns: Patterns = None, include_path: IncludePath = None, as_json: Json = False, debug: Debug = False
) -> None:
    """List the tasks of lm-eval that `compress eval --tasks` takes: tasks, groups (several, averaged), tags (several).

    \b
    Example:  compress tasks arc
    """
    from compress.cli.show import note, print_json, show, table
    from compress.errors import RecipeError
    from compress.evaluation.harness.tasks import list_tasks

    found = list_tasks(patterns or (), include_path or ())
    if as_json:
        print_json(found)
        return
    if not found:
        raise RecipeError(
            f"{' '.join(patterns or ())}: no task's name has it; compress tasks, alone, lists all of them"
        )
    show(table(("name", "kind", "file"), [(task["name"], task["kind"], task["file"]) for task in found]))
    note(f"{len(found):,} names")
