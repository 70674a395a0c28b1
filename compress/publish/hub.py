"""Publishing a result on the Hub: `push`.

Everything that can be refused is refused before the first byte goes up: the folder, the token, the name. The upload is
huggingface_hub's own for large folders (`upload_folder`): what has gone up stays there, so the same command goes on where it was
cut off. Afterwards the repository is listed and held to the files.
"""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from compress.checkpoint.hub import TIMEOUT, is_unreachable, page
from compress.errors import CheckpointError, RecipeError
from compress.publish.base_model import front_matter
from compress.publish.files import Publication, Result, publication, read_result
from compress.publish.target import PushErrors, Target, check_name, look, name_taken, other_model, stale


@dataclass(frozen=True)
class Pushed:
    """What was done, or would be (`dry_run`)."""

    repo: str
    url: str
    revision: str
    private: bool
    created: bool
    files: dict[str, int]
    removed: list[str]
    left_out: list[str]
    card: str
    users_card: bool
    base_model: str | None
    commit: str | None = None
    dry_run: bool = False
    notes: list[str] = field(default_factory=list)


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = True,
    revision: str | None = None,
    token: str | None = None,
    base_model: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    note: Callable[[str], None] | None = None,
) -> Pushed:
    """Publish a finished folder, with a model card made from its report.

    Args:
        repo: owner/name, or a name of one's own.
        private: of a repository that is made; one that exists stays as it is.
        revision: a branch, made if it is not there; by default main.
        token: by default that of `hf auth login` or HF_TOKEN.
        base_model: id of the base model on the Hub, for a result that was made from a local folder.
        overwrite: replace another model that the repository holds.
        dry_run: upload nothing.

    Raises: RecipeError, CheckpointError: one line with the remedy. An interrupted upload goes on when called again.
    """
    result = read_result(Path(folder).expanduser())
    notes: list[str] = []
    with PushErrors(repo):
        target = look(repo, revision, token, private, notes if dry_run else None)
        base = base_model or result.base
        fields, said = ask_base(base, token)
        notes += said
        made = publication(
            result, target.repo, base=base, base_fields=fields, figure=_figure(result), notes=tuple(said)
        )
        check_name(target, made, result, overwrite, token)
        removed = stale(target, made)
        if target.files is not None and target.private != private:
            notes.append(
                f"{target.repo} exists and stays {'private' if target.private else 'public'}; change that on its page"
            )
        if base is None and not made.users_card:
            notes.append(
                "the card names no base model, as this one was made from a local folder; name it: --base-model ID"
            )
        for text in notes:
            if note is not None:
                note(text)
        commit = None if dry_run else _upload(target, made, removed, token)
    return Pushed(
        target.repo, page(target.repo), target.revision, target.private, target.files is None, made.sizes(), removed,
        list(result.left_out), made.card, made.users_card, base, commit, dry_run, notes,
    )  # fmt: skip


def check_push(repo: str, revision: str | None, base: str | None, weights: str, overwrite: bool) -> None:
    """Before there is a result: could one be pushed that is made from `base`, whose weights have this checksum?

    Raises: CheckpointError, RecipeError.
    """
    with PushErrors(repo):
        target = look(repo, revision, None, True, None)
        if not overwrite and other_model(target, base, None, {"work": {"weights": weights}}):
            raise name_taken(target)


def ask_base(base: str | None, token: str | None) -> tuple[dict[str, Any] | None, list[str]]:
    """The fields of the base model's card as it is on the Hub, and what is to be said of it. None: nothing was found out."""
    if base is None:
        return None, []
    from huggingface_hub import HfApi, errors, hf_hub_download

    try:
        info = HfApi(token=token).model_info(base, timeout=TIMEOUT)
    except errors.HFValidationError:
        raise RecipeError(
            f"--base-model {base}: not the id of a model on the Hub, which has the form owner/name"
        ) from None
    except errors.RepositoryNotFoundError:
        return None, [
            f"The base model {base} is not, or no longer, to be found on the Hub: look after its licence yourself."
        ]
    except Exception as error:
        if is_unreachable(error):
            return None, []
        raise
    said = []
    if info.gated:
        said = [f"Access to the base model {base} is gated: its licence and its conditions hold for this model too."]
    try:
        return front_matter(Path(hf_hub_download(base, "README.md", token=token)).read_text(encoding="utf-8")), said
    except (errors.EntryNotFoundError, errors.GatedRepoError, UnicodeDecodeError):
        return None, said


def _upload(target: Target, made: Publication, removed: list[str], token: str | None) -> str:
    """Returns: the commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    if target.files is None:
        api.create_repo(target.repo, private=target.private, exist_ok=True)
    if target.revision != "main" and (target.files is None or not target.has_branch):
        api.create_branch(target.repo, branch=target.revision, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="compress-push-") as scratch:
        for name, content in made.files.items():
            place = Path(scratch) / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                place.write_bytes(content)
            else:
                place.symlink_to(content.absolute())
        with _xet_where_spoken(api, target):
            info = api.upload_folder(
                repo_id=target.repo,
                folder_path=scratch,
                revision=target.revision,
                commit_message="Upload a model compressed with compress-llm",
                delete_patterns=[glob.escape(name) for name in removed] or None,
            )
    _check_uploaded(api, target, made, info.oid)
    return str(info.oid)


@contextmanager
def _xet_where_spoken(api: Any, target: Target) -> Iterator[None]:
    """Large files go up by Xet, which huggingface_hub takes for granted where it is installed. Mirrors may know LFS only."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers

    before = constants.HF_HUB_DISABLE_XET
    if not before:
        address = f"{api.endpoint}/api/models/{target.repo}/xet-write-token/{quote(target.revision, safe='')}"
        answer = get_session().get(address, headers=build_hf_headers(token=api.token), timeout=TIMEOUT)
        constants.HF_HUB_DISABLE_XET = answer.status_code == 404
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


def _check_uploaded(api: Any, target: Target, made: Publication, commit: str) -> None:
    """Raises: CheckpointError if the repository is not what was sent."""
    there = {
        f.path: f.size for f in api.list_repo_tree(target.repo, recursive=True, revision=commit) if hasattr(f, "size")
    }
    for name, size in made.sizes().items():
        if there.get(name) != size:
            found = "is missing" if name not in there else f"has {there[name]:,} bytes instead of {size:,}"
            raise CheckpointError(f"{target.repo}: {name} {found} on the Hub; give the same command again")


def _figure(result: Result) -> bytes | None:
    if result.report is None:
        return None
    from compress.publish.figure import card_figure

    return card_figure(result.report)
