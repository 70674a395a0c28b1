"""`compress export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from compress.cli.options import Debug, Json, MemoryBudget, Quiet, Revision, refuse_unfinished

Source = Annotated[str, typer.Argument(metavar="DIR", help="a compressed model: a folder, or a Hub id")]
To = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help="compressed-tensors, gptq, awq, or dense: plain weights, as large as the original",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="FOLDER", help="a new folder  [default: DIR-FORMAT]", show_default=False),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="discard an earlier export that FOLDER holds")]


def export(
    folder: Source,
    to: To,
    out: Out = None,
    overwrite: Overwrite = False,
    memory_budget: MemoryBudget = None,
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a compressed model in a format that servers and other libraries read. Nothing is quantized anew.

    Layers are converted one by one, and everything is read back and compared before the folder becomes a model. What
    the format cannot hold is refused, with the layer's name; what servers do not run well is said.

    \b
    Example:  compress export out/demo --format gptq
    """
    refuse_unfinished(folder)
    from compress.cli.progress import Display
    from compress.cli.show import print_json
    from compress.export.run import export as write

    with Display(quiet) as display:
        found = write(
            folder, to, out, overwrite=overwrite, revision=revision, progress=display, memory_budget=memory_budget
        )  # fmt: skip
    print_json(found) if as_json else _print(found)


def _print(found: dict[str, Any]) -> None:
    from compress.cli.show import human_bytes, note, pairs, show

    read = found["read_back"]
    exact = "weights equal bit for bit"
    if read["largest_weight_change"]:
        exact = f"weights change by at most {read['largest_weight_change']:.2g} of the largest of their layer"
    before, after = found["bytes_weights_source"], found["bytes_weights"]
    rows = [
        ("format", f"{found['format']}, {found['layers']} compressed layers"),
        ("weights", f"{human_bytes(after)} (as they were: {human_bytes(before)})"),
        ("read back", f"{read['tensors']} tensors equal; {read['layers']} layers: {exact}"),
        ("result", found["folder"]),
        ("try next", found["next"]),
    ]
    show(pairs(rows))
    for warning in found["warnings"]:
        note(f"warning: {warning}")
