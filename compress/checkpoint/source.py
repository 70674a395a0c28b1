"""Where a model comes from: a local folder, the Hub, or the model that ships with the package.

`find_source` looks at `config.json` and shard headers only; nothing big is fetched until `Source.fetch`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.checkpoint.headers import TensorInfo, read_headers, read_json, weight_files
from compress.errors import CheckpointError

SHIPPED = "shipped"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json", "spiece.model")
SIDE_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "spiece.model",
    "chat_template*", "generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "USAGE_POLICY*",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A checkpoint, before its weights are read. `folder` is None as long as the weights are on the Hub only."""

    name: str  # as the user wrote it
    config: dict[str, Any]
    infos: dict[str, TensorInfo]
    folder: Path | None
    revision: str | None = None
    files: tuple[str, ...] = ()

    @property
    def has_tokenizer(self) -> bool:
        return any(name in self.files for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model"))

    def fetch(self) -> Path:
        """The local folder with all files, downloaded into the Hub's cache if it must be.

        Raises: CheckpointError saying what failed and what to do.
        """
        if self.folder is not None:
            return self.folder
        from huggingface_hub import snapshot_download

        with HubErrors(self.name):
            return Path(
                snapshot_download(
                    self.name,
                    revision=self.revision,
                    allow_patterns=["*.safetensors", "*.json", *SIDE_FILES, "README.md"],
                )
            )


def find_source(path: str, revision: str | None = None) -> Source:
    """Look at a model's config and headers: a folder if there is one of that name, else a Hub id.

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
        return Source(path, read_json(folder / "config.json"), read_headers(folder), folder, revision, names)
    if folder.exists():
        raise CheckpointError(f"{path}: is a file; name the folder that holds config.json and *.safetensors")
    if path.startswith(("/", "./", "../", "~")) or path.count("/") != 1:
        raise CheckpointError(f"{path}: no such model folder (and no Hub id, which has the form owner/name)")
    return _find_on_hub(path, revision)


def _find_on_hub(repo: str, revision: str | None) -> Source:
    from huggingface_hub import HfApi, hf_hub_download

    with HubErrors(repo):
        api = HfApi()
        files = tuple(sorted(api.list_repo_files(repo, revision=revision)))
        config = read_json(Path(hf_hub_download(repo, "config.json", revision=revision)))
        metadata = api.get_safetensors_metadata(repo, revision=revision)
    infos = {}
    for file, content in metadata.files_metadata.items():
        for name, tensor in content.tensors.items():
            begin, end = tensor.data_offsets
            infos[name] = TensorInfo(name, tensor.dtype, tuple(tensor.shape), Path(file), begin, end - begin)
    return Source(repo, config, infos, None, revision, files)


class HubErrors:
    """Turns what the Hub's client raises into one line with a remedy."""

    def __init__(self, repo: str):
        self.repo = repo

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, CheckpointError) or not isinstance(error, Exception):
            return
        from huggingface_hub import errors

        local = "or download it elsewhere and give its folder: --set model=FOLDER"
        unreachable = (
            f"no such folder here, and the Hub cannot be reached ({type(error).__name__}); check the network, {local}"
        )
        if isinstance(error, errors.LocalEntryNotFoundError):
            why = unreachable
        elif isinstance(error, errors.HFValidationError):
            why = "no such folder here, and no name that a model on the Hub can have; check the path"
        elif isinstance(error, errors.GatedRepoError):
            why = f"access is gated; accept its licence on its Hub page, then: hf auth login, {local}"
        elif isinstance(error, errors.RepositoryNotFoundError):
            why = f"no such folder here and no such model on the Hub (or it is private: hf auth login), {local}"
        elif isinstance(error, errors.RevisionNotFoundError):
            why = "the Hub has no such revision of it; check model.revision"
        elif isinstance(error, errors.EntryNotFoundError | errors.NotASafetensorsRepoError):
            why = "the Hub has no safetensors weights or no config.json for it; choose a repository with safetensors"
        else:
            why = unreachable
        raise CheckpointError(f"{self.repo}: {why}") from None


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
