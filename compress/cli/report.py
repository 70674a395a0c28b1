"""`compress report`, and what other verbs need to write a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from compress.cli.options import Debug, Quiet

Result = Annotated[
    Path,
    typer.Argument(metavar="DIR|FILE", help="the result of a run, or what `compress eval --json` printed, as a file"),
]
Html = Annotated[
    Path | None,
    typer.Option(
        "--html",
        metavar="FILE",
        help="where the page goes  [default: compress_report.html in DIR, or beside FILE]",
        show_default=False,
    ),
]


def report(result: Result, html: Html = None, quiet: Quiet = False, debug: Debug = False) -> None:
    """Show the report of a finished run or evaluation again, and make its HTML page anew from the JSON.

    \b
    Example:  compress report out/demo
    """
    from compress.checkpoint.headers import read_json
    from compress.checkpoint.result import REPORT
    from compress.cli.options import refuse_unfinished
    from compress.cli.show import note
    from compress.errors import CheckpointError
    from compress.report import PAGE
    from compress.report.write import write_page

    result = result.expanduser()
    refuse_unfinished(str(result))
    source = result / REPORT if result.is_dir() else result
    if not source.is_file():
        raise CheckpointError(f"{source}: no such report; name the folder of a finished run, or a file of eval --json")
    content = read_json(source)
    file = html or (result / PAGE if result.is_dir() else source.with_suffix(".html"))
    check_page(file)
    write_page(content, file)
    if not quiet:
        _show(content, result)
    note(f"page: {file}")


def _show(content: dict[str, Any], result: Path) -> None:
    if content.get("kind") == "run":
        from compress.cli.summary import print_report

        print_report(content, result if result.is_dir() else result.parent, already_finished=False, notes=())
    else:
        from compress.cli.evaluate import print_evaluation

        print_evaluation(content, content.get("tasks") or {})


def check_page(file: Path) -> None:
    """Before the work, that a page can be made and has a place. Raises: CheckpointError."""
    from importlib.util import find_spec

    from compress.errors import CheckpointError

    if find_spec("matplotlib") is None:
        raise CheckpointError("--html: the page needs matplotlib, which is not installed: pip install matplotlib")
    folder = file.expanduser().absolute().parent
    if file.is_dir() or not folder.is_dir():
        raise CheckpointError(
            f"--html {file}: {'is a folder' if file.is_dir() else f'{folder} is no folder'}; name a file"
        )
