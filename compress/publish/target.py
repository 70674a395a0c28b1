"""The repository that a result goes to: what it holds now, whether that may be replaced, and what the Hub says to us."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.checkpoint.hub import OURS, TIMEOUT, is_unreachable, page, refusal, unreachable
from compress.checkpoint.result import REPORT
from compress.checkpoint.seal import SEAL
from compress.errors import CheckpointError, RecipeError
from compress.publish.base_model import front_matter
from compress.publish.files import Publication, Result

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
        said = why(error).removesuffix(f"; {KEPT}")
        unknown.append(f"what the repository holds now is not known: {said}")
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
    mine = (report or {}).get("work", {}).get("weights")
    if mine is not None and mine == (theirs.get("work") or {}).get("weights"):
        return False  # made from the same weights, whatever they were called
    card = _remote(target, "README.md", token)
    known = (theirs.get("base") or {}).get("id") or front_matter(card.decode(errors="replace")).get("base_model")
    return base != known if base is not None or known is not None else mine is not None


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
        raise CheckpointError(f"{self.repo}: {why(error)}") from None


def why(error: BaseException) -> str:
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
