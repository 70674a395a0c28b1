"""`compress run`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.cli.options import (
    ActivationMemory,
    Debug,
    Device,
    Json,
    ModelArgument,
    Overrides,
    Quiet,
    RecipeFile,
    check_device,
    default_out,
    parse_size,
    recipe_overrides,
)

if TYPE_CHECKING:
    from compress.pipeline.plan import Plan

Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        help="a new folder, or that of an interrupted run, to go on with it  [default: the recipe's output.path, or out/RECIPE]",
        show_default=False,
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="discard what an earlier run left in DIR")]


def run(
    recipe: RecipeFile,
    model: ModelArgument = None,
    out: Out = None,
    overrides: Overrides = None,
    device: Device = "auto",
    activation_memory: ActivationMemory = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compress a checkpoint block by block, and measure the result. Peak memory is about one decoder block.

    An interrupted run goes on where it was when the same command is given again.

    \b
    Example:  compress run --recipe llama3-4bit --out out/llama3-4bit meta-llama/Llama-3.2-1B
    """
    from compress.cli.progress import Display
    from compress.cli.show import note, print_json, show
    from compress.cli.signals import Ended
    from compress.cli.summary import print_report
    from compress.pipeline import run as pipeline
    from compress.recipe import Recipe

    activation_bytes = None if activation_memory is None else parse_size(activation_memory, "--activation-memory")
    machine = pipeline.Machine(check_device(device), activation_bytes)
    loaded = Recipe.load(recipe, recipe_overrides(model, overrides))
    folder = Path(out or loaded.output.path or default_out(recipe)).expanduser()

    def show_plan(plan: Plan) -> None:
        if not quiet:
            from compress.cli.plan import short

            show(short(plan), stream=sys.stderr)
            note("")

    with Display(quiet) as display:
        try:
            pipeline.compute_device(machine)
            result = pipeline.run(
                loaded, folder, machine=machine, overwrite=overwrite, progress=display, on_plan=show_plan
            )
        except Ended:
            display.stop()
            note(f"{_finished(folder)}; to go on:  {resume_command(sys.argv[1:])}")
            raise
    if as_json:
        pushed = {} if result.pushed is None else {"pushed": asdict(result.pushed)}
        again = {"already_finished": result.already_finished, "evaluated_again": result.evaluated_again}
        print_json({**result.report, **again, "notes": display.notes, **pushed})
        display.repeat_notes()
        return
    print_report(result.report, folder, result.already_finished, display.notes, result.evaluated_again)
    if result.pushed is not None:
        from compress.cli.push import print_pushed

        print_pushed(replace(result.pushed, notes=[]))  # they are among the display's


def resume_command(arguments: list[str]) -> str:
    """The command line that goes on with this run: the same one, but for --overwrite, which would begin it again."""
    name = ["python", "-m", "compress"] if Path(sys.argv[0]).name == "__main__.py" else ["compress"]
    return shlex.join([*name, *(a for a in arguments if a != "--overwrite")])


def _finished(folder: Path) -> str:
    """ "3 finished blocks are kept in out/demo", by the journal."""
    from compress.pipeline.journal import JOURNAL, WORK_FOLDER

    try:
        lines = (folder / WORK_FOLDER / JOURNAL).read_bytes().count(b"\n") - 1
    except OSError:
        lines = 0
    return f"what is finished is kept in {folder}" if lines > 0 else "nothing was finished yet"
