"""`compress eval`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli.options import (
    ActivationMemory,
    Debug,
    Device,
    Json,
    ModelFolder,
    Quiet,
    RemoteCode,
    Revision,
    check_device,
    parse_size,
    refuse_unfinished,
)

if TYPE_CHECKING:
    from compress.recipe import Evaluation

Reference = Annotated[
    str | None,
    typer.Option("--reference", metavar="ORIGINAL", help="also KL divergence and top-1 agreement with this model"),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data", help="a Hub data set, files or `shipped` (repeatable)  [default: shipped]", show_default=False
    ),
]
Split = Annotated[
    str | None, typer.Option("--split", help="split of a Hub data set  [default: test]", show_default=False)
]
Subset = Annotated[str | None, typer.Option("--subset", help="configuration of a Hub data set")]
Column = Annotated[str | None, typer.Option("--column", help="the column that holds the text")]
Length = Annotated[
    int | None,
    typer.Option("--length", help="tokens per window  [default: 2048, or the model's limit]", show_default=False),
]
Stride = Annotated[
    int | None,
    typer.Option("--stride", help="tokens between windows  [default: length: no overlap]", show_default=False),
]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", help="use the head of the text only")]


def evaluate(
    model: ModelFolder,
    reference: Reference = None,
    data: Data = None,
    split: Split = None,
    subset: Subset = None,
    column: Column = None,
    length: Length = None,
    stride: Stride = None,
    max_tokens: MaxTokens = None,
    device: Device = "auto",
    activation_memory: ActivationMemory = None,
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity on held-out text, and fidelity to the original. Blocks are streamed: a whole model is never in memory.

    \b
    Example:  compress eval out/demo --reference shipped
    """
    for folder in filter(None, (model, reference)):
        refuse_unfinished(folder)
    from compress.calibration.data import check_data
    from compress.cli.progress import Display
    from compress.cli.show import print_json
    from compress.evaluation.evaluate import evaluate as measure
    from compress.pipeline.run import Machine

    given = {
        "data": tuple(data) if data else None, "split": split, "subset": subset, "column": column, "length": length,
        "stride": stride, "max_tokens": max_tokens,
    }  # fmt: skip
    activation_bytes = None if activation_memory is None else parse_size(activation_memory, "--activation-memory")
    with _flags_named(), Display(quiet) as display:
        settings = _settings({key: value for key, value in given.items() if value is not None})
        check_data(settings, "evaluation")
        found = measure(
            model,
            reference=reference,
            settings=settings,
            machine=Machine(check_device(device), activation_bytes),
            progress=display,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    print_json(found) if as_json else _print(found)


@contextmanager
def _flags_named() -> Iterator[None]:
    """Errors that speak of a recipe's `evaluation.max_tokens` speak of --max-tokens instead."""
    from compress.errors import RecipeError

    try:
        yield
    except RecipeError as error:
        text = re.sub(r"--set evaluation\.(\w+)=", r"evaluation.\1 ", str(error))
        text = re.sub(r"evaluation\.(\w+)", lambda field: "--" + field[1].replace("_", "-"), text)
        raise RecipeError(text) from error


def _settings(given: dict[str, Any]) -> Evaluation:
    from pydantic import ValidationError

    from compress.errors import RecipeError
    from compress.recipe import Evaluation
    from compress.recipe_errors import one_line

    try:
        return Evaluation(**given)
    except ValidationError as error:
        raise RecipeError(f"evaluation.{one_line(error, Evaluation)}") from None


def _print(found: dict[str, Any]) -> None:
    from compress.cli.show import out, pairs, show, table
    from compress.cli.summary import described, fidelity_rows

    rows = []
    for role in ("reference", "model"):
        if role in found:
            scores = found[role]
            rows.append((
                scores["path"], f"{scores['perplexity']:.4f}", f"{scores['nll_per_token']:.5f}", f"{scores['bits_per_byte']:.5f}"
            ))  # fmt: skip
    show(table(("model", ">perplexity per token", ">nats per token", ">bits per byte"), rows))
    out("")
    text = found["text"]
    measured = [
        ("measured on", described(found)),
        ("text", f"{text['text_bytes']:,} bytes, {text['text_tokens']:,} tokens"),
    ]
    show(pairs([*fidelity_rows(found["fidelity"]), *measured] if "fidelity" in found else measured))
