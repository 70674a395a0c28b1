"""Options of verbs that run a stack at a chosen size, and what is said while it changes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.budget import Budget
    from compress.runtime.follow_memory import Change, FollowMemory

MemoryBudget = Annotated[
    str | None,
    typer.Option(
        "--memory-budget",
        metavar="SIZE",
        help="of a bitstack model, load as much as fits: 4.2GiB of all tensors, or 2.5bits per weight",
    ),
]
FollowMemoryOption = Annotated[
    str | None,
    typer.Option(
        "--follow-memory",
        metavar="SIZE",
        help="let a bitstack model shrink and grow between tokens so that this much memory stays free, such as 2GiB",
    ),
]


def load_options(model: str, budget: str | None, follow: str | None, device: torch.device) -> dict[str, Any]:
    """What `compress.load` is told. Raises: RecipeError for sizes that are none, CheckpointError for a budget too small."""
    from compress.checkpoint.budget import parse_budget
    from compress.runtime.follow_memory import first_budget

    most = None if budget is None else parse_budget(budget, "--memory-budget")
    if follow is not None and (folder := Path(model).expanduser()).is_dir():
        most = first_budget(folder, kept_free(follow), most, device) or most
    return {} if most is None else {"memory_budget": most}


def kept_free(follow: str) -> int:
    """The bytes that `--follow-memory` asks for."""
    from compress.cli.options import parse_size

    return parse_size(follow, "--follow-memory")


def following(
    loaded: Any, model: str, budget: str | None, follow: str | None, quiet: bool
) -> AbstractContextManager[FollowMemory | None]:
    """While it is entered, the size follows the free memory, where that is asked for; changes are told on stderr.

    Raises: RecipeError if the model's size cannot change.
    """
    from compress.checkpoint.budget import parse_budget
    from compress.errors import RecipeError
    from compress.runtime.follow_memory import FollowMemory

    if follow is None:
        return nullcontext()
    if getattr(loaded, "stack", None) is None:
        raise RecipeError(
            f"--follow-memory: {model} is no stack, so its size cannot change; leave it out, or compress the model with bitstack"
        )
    most: Budget | None = None if budget is None else parse_budget(budget, "--memory-budget")
    return FollowMemory(loaded, kept_free(follow), most=most, tell=(lambda change: None) if quiet else _tell)


def size_of(loaded: Any) -> str | None:
    """How large a stack was loaded, in a sentence; None for other models."""
    from compress.checkpoint.budget import shown

    stack = getattr(loaded, "stack", None)
    if stack is None:
        return None
    return (
        f"{shown(stack.nbytes)} of {shown(stack.table.maximum)}, {stack.bits:.2f} bits per weight of the stacked layers; the "
        f"smallest is {shown(stack.table.minimum)}"
    )


def sizes(loaded: Any, followed: FollowMemory | None) -> dict[str, Any]:
    """For `--json`: the size at the end, and the changes on the way; nothing for a model without a stack."""
    stack = getattr(loaded, "stack", None)
    if stack is None:
        return {}
    found: dict[str, Any] = {"model_bytes": stack.nbytes, "bits": stack.bits}
    if followed is not None:
        found["changes"] = [
            {"seconds": c.seconds, "free_bytes": c.free, "model_bytes": c.done.nbytes, "bits": c.done.bits}
            for c in followed.changes
        ]
    return found


def check_followed(followed: FollowMemory | None) -> None:
    """Say what ended the following early."""
    from compress.cli.show import note

    if followed is not None and followed.error is not None:
        note(f"note: the size stayed as it was from there on: {followed.error}")


def _tell(change: Change) -> None:
    from compress.checkpoint.budget import shown
    from compress.cli.show import note

    done = change.done
    note(
        f"\n[{change.seconds:.1f} s: {shown(change.free)} free; {shown(done.nbytes_before)} -> {shown(done.nbytes)}, "
        f"{done.bits:.2f} bits per weight]"
    )
