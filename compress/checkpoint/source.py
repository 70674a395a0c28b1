"""Where a model comes from: a local folder, the Hub, or the model that ships with the package.

`find_source` looks at `config.json` and shard headers only; nothing big is fetched until `Source.fetch`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.checkpoint.budget import Budget
from compress.checkpoint.headers import TensorInfo, read_headers, read_json, weight_files
from compress.checkpoint.hub import SIDE_FILES as SIDE_FILES
from compress.checkpoint.hub import HubErrors as HubErrors
from compress.checkpoint.hub import HubModel, find_on_hub
from compress.errors import CheckpointError

SHIPPED = "shipped"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json", "spiece.model")


@dataclass(frozen=True)
class Source:
    """A checkpoint, before its weights are read. `folder` is None as long as the weights are on the Hub only."""

    name: str  # as the user wrote it
    config: dict[str, Any]
    infos: dict[str, TensorInfo]
    folder: Path | None
    revision: str | None = None
    files: tuple[str, ...] = ()
    repo: str | None = None  # its id on the Hub, if it came from there
    on_hub: HubModel | None = None

    @property
    def has_tokenizer(self) -> bool:
        return any(name in self.files for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model"))

    @property
    def published(self) -> dict[str, str | None]:
        """What may be said of it in public: its id on the Hub and the commit, else a title that tells no path."""
        if self.repo is not None:
            commit = self.on_hub.commit if self.on_hub is not None else self.folder.name if self.folder else None
            return {"id": self.repo, "title": self.repo.split("/")[1], "commit": commit}
        folder = (self.folder or Path(self.name)).expanduser().absolute()
        cached = re.fullmatch(r"models--([\w.-]+?)--([\w.-]+)", folder.parent.parent.name)
        if cached and folder.parent.name == "snapshots":  # a folder of the Hub's cache
            return {"id": f"{cached[1]}/{cached[2]}", "title": cached[2], "commit": folder.name}
        return {"id": None, "title": folder.name, "commit": None}

    def fetch(self, note: Callable[[str], None] | None = None, budget: Budget | None = None) -> Path:
        """The local folder with all files, downloaded into the Hub's cache if it must be, which `note` is told. Of a stack, the
        files that `budget` needs.

        Raises: CheckpointError saying what failed and what to do.
        """
        if self.folder is not None:
            return self.folder
        assert self.on_hub is not None
        return self.on_hub.fetch(note, budget)


def find_source(path: str, revision: str | None = None, budget: Budget | None = None) -> Source:
    """Look at a model's config and headers: a folder if there is one of that name, else a Hub id. Of a stack, what fits
    `budget`.

    Raises: CheckpointError naming what is missing, damaged or out of reach.
    """
    if path == SHIPPED:
        from compress.shipped import model_path

        folder = model_path()
    else:
        folder = Path(path).expanduser()
    try:
        is_folder = folder.is_dir()
        names = tuple(sorted(p.name for p in folder.iterdir() if p.is_file())) if is_folder else ()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; check the path and its permissions") from None
    if is_folder:
        if "config.json" not in names:
            weight_files(folder)  # says so where the weights are of a kind that is not read here
            raise CheckpointError(
                f"{folder}: no config.json in it; name the folder that holds config.json and *.safetensors"
            )
        return Source(path, read_json(folder / "config.json"), read_headers(folder, budget), folder, revision, names)
    if folder.exists():
        raise CheckpointError(f"{path}: is a file; name the folder that holds config.json and *.safetensors")
    if path.startswith(("/", "./", "../", "~")) or path.count("/") != 1:
        raise CheckpointError(f"{path}: no such model folder (and no Hub id, which has the form owner/name)")
    return _find_on_hub(path, revision, budget)


def _find_on_hub(repo: str, revision: str | None, budget: Budget | None) -> Source:
    found = find_on_hub(repo, revision)
    if isinstance(found, Path):
        names = tuple(sorted(p.name for p in found.iterdir() if p.is_file()))
        return Source(repo, read_json(found / "config.json"), read_headers(found, budget), found, revision, names, repo)
    with HubErrors(repo):
        return Source(
            repo, found.config(), found.headers(budget), None, revision, tuple(sorted(found.sizes)), repo, found
        )


def tokenizer_size(source: Source) -> int | None:
    """The largest id of its vocabulary plus one, where tokenizer.json says it; None if unknown.

    Tokens that were added are left out: some models have one for images that their table of embeddings does not hold.
    """
    if source.folder is None or "tokenizer.json" not in source.files:
        return None
    try:
        content = json.loads((source.folder / "tokenizer.json").read_text(encoding="utf-8"))
        vocab = content["model"]["vocab"]
        ids = [i for _, i in vocab] if vocab and isinstance(vocab, list) and isinstance(vocab[0][1], int) else None
        if isinstance(vocab, dict):
            ids = list(vocab.values())
        elif ids is None:
            ids = [len(vocab) - 1]
        return 1 + max(ids, default=-1)
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        raise CheckpointError(f"{source.folder / 'tokenizer.json'}: unreadable; fetch it again") from None
