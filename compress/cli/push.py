"""`compress push`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.cli.options import Debug, Json, Quiet

if TYPE_CHECKING:
    from compress.publish.hub import Pushed

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="the folder of a finished run, or of an export")]
Repo = Annotated[str, typer.Argument(metavar="REPO", help="owner/name, or a name of your own")]
Public = Annotated[bool, typer.Option("--public", help="make the repository public; one that exists stays as it is")]
Branch = Annotated[
    str | None,
    typer.Option(
        "--revision", metavar="BRANCH", help="a branch, made if it is not there  [default: main]", show_default=False
    ),
]
Token = Annotated[
    str | None,
    typer.Option("--token", metavar="TOKEN", help="instead of that of `hf auth login` or HF_TOKEN; never shown"),
]
BaseModel = Annotated[
    str | None,
    typer.Option("--base-model", metavar="ID", help="the base model on the Hub, if yours came from a local folder"),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace another model that the repository holds")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="upload nothing: list the files, their sizes and the card")]


def push(
    folder: Folder,
    repo: Repo,
    public: Public = False,
    revision: Branch = None,
    token: Token = None,
    base_model: BaseModel = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Publish a result on the Hub, with a model card made from its report. Private unless --public is said.

    An upload that was cut off goes on when the same command is given again.

    \b
    Example:  compress push out/demo me/novels-4bit --dry-run
    """
    from compress.cli.show import note, print_json
    from compress.cli.signals import Ended
    from compress.publish.hub import push as publish

    if quiet:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
    try:
        pushed = publish(
            folder, repo, private=not public, revision=revision, token=token, base_model=base_model, overwrite=overwrite,
            dry_run=dry_run,
        )  # fmt: skip
    except Ended:
        note("what has gone up is kept by the Hub: the same command goes on")
        raise
    if as_json:
        print_json(asdict(pushed))
    else:
        print_pushed(pushed)


def print_pushed(pushed: Pushed) -> None:
    """What went where, and how it is loaded; of a dry run the files and the card."""
    from compress.cli.show import human_bytes, note, out, show, table

    total = sum(pushed.files.values())
    kind = "private" if pushed.private else "public"
    where = pushed.repo if pushed.revision == "main" else f"{pushed.repo}, branch {pushed.revision}"
    if pushed.dry_run:
        show(table(("file", ">size"), [(name, human_bytes(size)) for name, size in pushed.files.items()]))
        out("")
        for name in pushed.removed:
            out(f"would be removed from the repository: {name}")
        for name in pushed.left_out:
            out(f"stays here, as it is no part of the result: {name}")
        out(f"README.md{' (yours, as it is)' if pushed.users_card else ''}:\n")
        out("\n".join(f"    {line}".rstrip() for line in pushed.card.splitlines()))
        made = "a new" if pushed.created else "the existing"
        out(
            f"\nnothing was uploaded: {len(pushed.files)} files, {human_bytes(total)}, would go to {made} {kind} {where}"
        )
    else:
        out(f"{len(pushed.files)} files, {human_bytes(total)}: {pushed.url} ({kind})")
        out(f"try it:  {try_command(pushed)}")
    for text in pushed.notes:
        note(f"note: {text}")


def try_command(pushed: Pushed) -> str:
    revision = "" if pushed.revision == "main" else f" --revision {pushed.revision}"
    return f'compress generate {pushed.repo}{revision} --prompt "Once upon a time"'
