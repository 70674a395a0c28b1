"""Options that several verbs share, each written once. Imports nothing that is slow: `compress --help` reads this file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from compress.errors import RecipeError

UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12} | {
    form: 2 ** (10 * power) for power, letter in enumerate("kmgt", start=1) for form in (letter, f"{letter}ib")
}
SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*$")


def parse_size(text: str, option: str) -> int:
    """Bytes of "8GiB", "512MB", "1.5G" or "1000". KB, MB, GB count in thousands; KiB, MiB, GiB and K, M, G in 1024s.

    Raises: RecipeError naming `option`.
    """
    found = SIZE.match(text)
    unit = (
        UNITS.get(found[2].lower().removesuffix("b") if found[2].lower() == "b" else found[2].lower())
        if found
        else None
    )
    if found is None or unit is None:
        raise RecipeError(f"{option} {text}: not a size; write it as 8GiB, 512MB or a number of bytes")
    return int(float(found[1]) * unit)


def check_device(name: str) -> str:
    """`name`, if it is a kind of device that we compute on; whether there is one shows when it is used."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise RecipeError(f"--device {name}: not a device that is used here; choose auto, cpu, cuda or cuda:1")
    return name


def check_arithmetic(name: str) -> dict[str, str]:
    """The options of `compress.load` that --arithmetic stands for."""
    if name not in ("int8", "float", "reference"):
        raise RecipeError(f"--arithmetic {name}: choose int8, float or reference")
    return {"kernels": "reference"} if name == "reference" else {"activations": name}


class State:
    """What `--debug` says, for `main`, which prints the errors of every verb."""

    debug = False


def _set_debug(value: bool) -> bool:
    State.debug = State.debug or value
    return value


RecipeFile = Annotated[
    str, typer.Option("--recipe", metavar="FILE|NAME", help="what to do to which layers: a file, or a shipped recipe")
]
ModelArgument = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="another model than the recipe's: a folder, a Hub id or `shipped`")
]
ModelFolder = Annotated[
    str, typer.Argument(metavar="MODEL", help="a folder, a Hub id or `shipped`; original or compressed")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="change a field of the recipe: steps.0.gptq.bits=3 (repeatable)"),
]
Device = Annotated[
    str, typer.Option("--device", metavar="DEVICE", help="where the arithmetic runs: auto, cpu, cuda, cuda:1")
]
ActivationMemory = Annotated[
    str | None,
    typer.Option(
        "--activation-memory",
        metavar="SIZE",
        help="memory for activations, such as 8GiB; more goes to disk  [default: a quarter of what is available]",
        show_default=False,
    ),
]
Arithmetic = Annotated[
    str,
    typer.Option(
        "--arithmetic",
        metavar="int8|float|reference",
        help="quantized layers on a CPU: native kernels with activations rounded to int8, or kept as float; or torch alone",
    ),
]
Revision = Annotated[str | None, typer.Option("--revision", help="branch, tag or commit on the Hub")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="run Python code that comes with the model")]
MemoryBudget = Annotated[
    str | None,
    typer.Option(
        "--memory-budget",
        metavar="SIZE",
        help="of a stack (bitstack), as much as fits: 4.2GiB of all tensors, or 2.5bits per weight  [default: all]",
        show_default=False,
    ),
]
Layers = Annotated[bool, typer.Option("--layers", help="a row for each layer, instead of one for those that are alike")]
IncludePath = Annotated[
    list[str] | None,
    typer.Option("--include-path", metavar="DIR", help="a folder with YAML files of further tasks (repeatable)"),
]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON, and nothing else, on stdout")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress on stderr; errors and warnings stay")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error", callback=_set_debug)]


def recipe_overrides(model: str | None, overrides: list[str] | None) -> list[str]:
    """MODEL and the --set of a command line, as overrides of a recipe; MODEL first, so that --set refines it."""
    import json

    first = [] if model is None else [f"model={json.dumps(model, ensure_ascii=False)}"]
    return [*first, *(overrides or [])]


def default_out(recipe: str) -> Path:
    """Where the result goes if neither --out nor the recipe says: out/NAME."""
    return Path("out") / Path(recipe).name.removesuffix(".yaml").removesuffix(".yml")


def refuse_unfinished(model: str) -> None:
    """Raises: CheckpointError if `model` is the folder of a run that was interrupted: it holds no whole model yet."""
    folder = Path(model).expanduser()
    if not folder.is_dir() or (folder / "config.json").exists():
        return
    from compress.errors import CheckpointError
    from compress.pipeline.journal import WORK_FOLDER

    if (folder / WORK_FOLDER).is_dir():
        journal = (folder / WORK_FOLDER / "journal.jsonl").exists()
        what = "an unfinished run" if journal else "an unfinished run or export"
        raise CheckpointError(f"{folder}: {what}; give its compress command again to finish it")
