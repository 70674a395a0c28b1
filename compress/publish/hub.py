"""Publishing a result on the Hub: `push`.

Everything that can be refused is refused before the first byte goes up: the folder, the token, the name. The upload is
huggingface_hub's own for large folders (`upload_folder`): what has gone up stays there, so the same command goes on where it was
cut off. Afterwards the repository is listed and held to the files.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from compress.checkpoint.hub import OURS, TIMEOUT, is_unreachable, page, refusal, unreachable
from compress.checkpoint.result import REPORT
from compress.checkpoint.seal import SEAL
from compress.errors import CheckpointError, RecipeError
from compress.publish.base_model import front_matter
from compress.publish.files import Publication, Result, publication, read_result

MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.gguf", "*.pt", "*.pth")
NEUTRAL = (
    ".gitattributes",
    ".gitignore",
    "README.md",
    "LICENSE*",
)  # what a repository may hold before there is a model
KEPT = "what has gone up is kept: the same command goes on"
PIECE = 2**20


@dataclass(frozen=True)
class Target:
    """The repository as it is now; `files` (name -> size, SHA-256 where the Hub has it) is None if there is none yet."""

    repo: str
    revision: str
    private: bool
    files: dict[str, tuple[int, str | None]] | None = None
    has_branch: bool = True


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


def look(repo: str, revision: str | None, token: str | None, private: bool, unknown: list[str] | None) -> Target:
    """Who we are, and what there is. `unknown`: told if that cannot be found out, instead of raising an error."""
    from huggingface_hub import HfApi, errors

    api, branch = HfApi(token=token), revision or "main"
    try:
        full = repo if "/" in repo else f"{api.whoami()['name']}/{repo}"
        if "/" in repo:
            api.whoami()
    except Exception as error:
        if unknown is None or not (is_unreachable(error) or isinstance(error, errors.LocalTokenNotFoundError)):
            raise
        why = _why(error).removesuffix(f"; {KEPT}")
        unknown.append(f"what the repository holds now is not known: {why}")
        return Target(repo if "/" in repo else f"YOU/{repo}", branch, private)
    try:
        info = api.model_info(full, timeout=TIMEOUT)
    except errors.RepositoryNotFoundError:
        return Target(full, branch, private)
    try:
        tree = list(api.list_repo_tree(full, recursive=True, revision=branch))
    except errors.RevisionNotFoundError:
        return Target(full, branch, bool(info.private), {}, has_branch=False)
    files = {f.path: (f.size, f.lfs.sha256 if f.lfs else None) for f in tree if hasattr(f, "size")}
    return Target(full, branch, bool(info.private), files)


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


def check_name(target: Target, made: Publication, result: Result, overwrite: bool, token: str | None) -> None:
    """Raises: RecipeError if the repository holds another model: neither part of this one nor an earlier result from its base."""
    if overwrite or not _model_files(target):
        return
    if other_model(target, made.base, token, result.report) and not _part_of(target, made):
        raise name_taken(target)


def name_taken(target: Target) -> RecipeError:
    return RecipeError(
        f"{target.repo} exists and holds another model ({page(target.repo)}); choose another name, another --revision, or "
        f"replace it with --overwrite"
    )


def other_model(target: Target, base: str | None, token: str | None, report: Mapping[str, Any] | None = None) -> bool:
    """Whether the repository holds a model that is no result of ours from the same base."""
    if not _model_files(target):
        return False
    if not {REPORT, SEAL} & set(target.files or ()):
        return True
    theirs = _remote_json(target, REPORT, token)
    card = _remote(target, "README.md", token)
    known = (theirs.get("base") or {}).get("id") or front_matter(card.decode(errors="replace")).get("base_model")
    if base is not None or known is not None:
        return base != known
    mine = (report or {}).get("work", {}).get("weights")
    return mine != theirs.get("work", {}).get("weights")


def _remote(target: Target, name: str, token: str | None) -> bytes:
    from huggingface_hub import hf_hub_download

    if name not in (target.files or ()):
        return b""
    return Path(hf_hub_download(target.repo, name, revision=target.revision, token=token)).read_bytes()


def _remote_json(target: Target, name: str, token: str | None) -> dict[str, Any]:
    try:
        content = json.loads(_remote(target, name, token) or b"{}")
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _model_files(target: Target) -> list[str]:
    return [n for n in target.files or () if not any(fnmatch.fnmatch(n, pattern) for pattern in NEUTRAL)]


def _part_of(target: Target, made: Publication) -> bool:
    """Whether all that is there is part of what goes there: an upload that was cut off."""
    for name in _model_files(target):
        assert target.files is not None
        size, sha256 = target.files[name]
        content = made.files.get(name)
        if content is None or made.sizes()[name] != size or (sha256 is not None and _sha256(content) != sha256):
            return False
    return True


def _sha256(content: Path | bytes) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    digest = hashlib.sha256()
    with content.open("rb") as stream:
        while piece := stream.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def stale(target: Target, made: Publication) -> list[str]:
    """Weights of another result that would be taken for part of this one."""
    return sorted(
        name
        for name in target.files or ()
        if name not in made.files and "/" not in name and any(fnmatch.fnmatch(name, p) for p in MODEL_FILES)
    )


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


class PushErrors:
    """Turns what the Hub's client raises into one line with a remedy."""

    def __init__(self, repo: str):
        self.repo = repo

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, CheckpointError | RecipeError) or not isinstance(error, Exception):
            return
        if isinstance(error, OSError) and error.errno in OURS:
            return
        raise CheckpointError(f"{self.repo}: {_why(error)}") from None


def _why(error: BaseException) -> str:
    from huggingface_hub import errors

    while isinstance(error, RuntimeError) and error.__cause__ is not None:  # "Error while uploading 'x' to the Hub."
        error = error.__cause__
    if isinstance(error, errors.LocalTokenNotFoundError):
        return "there is no token to push with: hf auth login, or set HF_TOKEN"
    if isinstance(error, errors.HFValidationError):
        return "not a name that a model on the Hub can have; it has the form owner/name"
    if isinstance(error, errors.HfHubHTTPError) and not is_unreachable(error):
        if error.response.status_code in (409, 412):
            return "somebody else changes it at this moment; give the same command again"
        return refusal(error)
    if is_unreachable(error) and isinstance(error, Exception):
        return f"{unreachable(error)}; {KEPT}"
    said = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {said}; {KEPT}"
