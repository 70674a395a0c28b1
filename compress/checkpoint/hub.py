"""A checkpoint on the Hub: what it holds, read without its weights, and fetching it into the Hub's cache.

One commit is settled on first, and everything is read from it: a repository may change between plan and run. Without a
network, what the cache holds of the model is used.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from compress.checkpoint.budget import Budget
from compress.checkpoint.headers import MAX_HEADER_BYTES, OWN_STEM, STANDARD_STEM, TensorInfo, parse_header, read_json
from compress.checkpoint.stack import STACK, StackTable, no_stack, parse_table
from compress.errors import CheckpointError

FIRST_BYTES = 100_000  # the header of most shards, in one request
CONNECTIONS = 8
OURS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EMFILE)
TIMEOUT = 10.0  # seconds until the Hub begins to answer
SIDE_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "spiece.model",
    "chat_template*", "generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "USAGE_POLICY*",
)  # fmt: skip
BESIDE = ("*.json", "*.py", "README.md", *SIDE_FILES)  # of the top folder, fetched with the weights
TEMPLATES = "additional_chat_templates/*"


@dataclass(frozen=True)
class HubModel:
    """A model on the Hub at one commit. `sizes`: bytes of each of its files."""

    repo: str
    revision: str | None
    commit: str
    sizes: Mapping[str, int]

    def config(self) -> dict[str, Any]:
        return read_json(self._small("config.json"))

    def headers(self, budget: Budget | None = None) -> dict[str, TensorInfo]:
        """Every tensor, by the headers of the weight files; of a stack what fits `budget`, by its table."""
        infos = self._base_headers()
        stack = self._stack(infos)
        if stack is None and budget is not None:
            raise no_stack(self.repo)
        return infos if stack is None else {**infos, **stack.infos(stack.fits(budget))}

    def _base_headers(self) -> dict[str, TensorInfo]:
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            infos: dict[str, TensorInfo] = {}
            for found in pool.map(self._header, self.weight_files()):
                infos.update(found)
        return infos

    def _stack(self, infos: Mapping[str, TensorInfo]) -> StackTable | None:
        """What the Hub has of a stack, by its table; no file of it need be here."""
        from compress.checkpoint.description import modules_of

        if STACK not in self.sizes:
            return None
        file = self._small(STACK)
        nbytes = sum(info.nbytes for info in infos.values())
        return parse_table(file.parent, read_json(file), modules_of(self.config()), nbytes)

    def weight_files(self) -> list[str]:
        """The weight files, by index or by name. Raises: CheckpointError if there are none that we read."""
        for stem in (STANDARD_STEM, OWN_STEM):
            index = f"{stem}.safetensors.index.json"
            if index in self.sizes:
                names = set(read_json(self._small(index)).get("weight_map", {}).values())
                missing = sorted(name for name in names if name not in self.sizes)
                if missing:
                    raise CheckpointError(
                        f"{self.repo}: {missing[0]}, of its index, is not on the Hub; choose another model"
                    )
                return sorted(names)
            if f"{stem}.safetensors" in self.sizes:
                return [f"{stem}.safetensors"]
        raise CheckpointError(
            f"{self.repo}: the Hub has no safetensors weights for it; choose a repository with safetensors"
        )

    def wanted(self, budget: Budget | None = None) -> list[str]:
        """The files that make up the checkpoint: weights that its index names, and what belongs beside them; of a stack, the
        files that hold what fits `budget`, as far as the Hub has them.

        Raises: CheckpointError if not even the smallest model fits, or with a `budget`, if there is no stack.
        """
        stack = self._stack(self._base_headers()) if STACK in self.sizes else None
        if stack is None and budget is not None:
            raise no_stack(self.repo)
        stacked = [] if stack is None else stack.files_for(stack.fits(budget))
        stacked = list(takewhile(lambda name: name in self.sizes, stacked))
        beside = [
            name
            for name in self.sizes
            if ("/" not in name and any(fnmatch.fnmatch(name, pattern) for pattern in BESIDE))
            or fnmatch.fnmatch(name, TEMPLATES)
        ]
        return sorted({*self.weight_files(), *beside, *stacked})

    def fetch(self, note: Callable[[str], None] | None = None, budget: Budget | None = None) -> Path:
        """The local folder with all files; of a stack, those that `budget` needs. What is in the cache is not fetched again.

        Raises: CheckpointError if the disk has no room for the rest, or the Hub does not give it.
        """
        from huggingface_hub import snapshot_download

        with HubErrors(self.repo, "what has arrived is kept: give the same command again"):
            names = self.wanted(budget)
            self._check_room(names, note)
            folder = Path(
                snapshot_download(self.repo, revision=self.revision, allow_patterns=[glob.escape(n) for n in names])
            )
        if folder.name != self.commit:
            raise CheckpointError(f"{self.repo}: changed on the Hub since it was planned; give the same command again")
        return folder

    def _check_room(self, names: Iterable[str], note: Callable[[str], None] | None) -> None:
        from huggingface_hub import constants, try_to_load_from_cache

        missing = [n for n in names if not isinstance(try_to_load_from_cache(self.repo, n, revision=self.commit), str)]
        needed = sum(self.sizes[name] for name in missing)
        cache = Path(constants.HF_HUB_CACHE)
        free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
        if needed > free:
            raise CheckpointError(
                f"{self.repo}: {needed / 2**20:,.0f} MiB are to be fetched into {cache}, the disk has {free / 2**20:,.0f} MiB "
                f"free; free some space or move the cache: HF_HOME=DIR"
            )
        if note is not None and needed:
            note(f"fetching {self.repo}: {len(missing)} files, {needed / 2**20:,.1f} MiB, into {cache}")

    def _small(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(self.repo, name, revision=self.commit))

    def _header(self, name: str) -> dict[str, TensorInfo]:
        size = self.sizes[name]
        start = self._bytes(name, min(FIRST_BYTES, size))
        length = 8 + int.from_bytes(start[:8], "little")
        if len(start) < 8 or length > min(MAX_HEADER_BYTES, size):
            raise CheckpointError(f"{self.repo}: {name}: truncated or not a safetensors file ({size:,} bytes)")
        return parse_header(start if length <= len(start) else self._bytes(name, length), Path(name), size)

    def _bytes(self, name: str, n_bytes: int) -> bytes:
        """The first bytes of a file."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

        response = http_backoff(
            "GET",
            hf_hub_url(self.repo, name, revision=self.commit),
            headers={**build_hf_headers(), "Range": f"bytes=0-{n_bytes - 1}", "Accept-Encoding": "identity"},
            timeout=TIMEOUT,
            follow_redirects=True,
        )
        hf_raise_for_status(response)
        return bytes(response.content[:n_bytes])


def fetch_file(repo: str, commit: str, name: str) -> bool:
    """Bring one file into the Hub's cache; False if the Hub has none of that name.

    Raises: CheckpointError saying what keeps it from us.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with HubErrors(repo, "what has arrived is kept: load it again"):
        try:
            hf_hub_download(repo, name, revision=commit)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return False
    return True


def find_on_hub(repo: str, revision: str | None) -> HubModel | Path:
    """A model on the Hub; where there is no network, its folder in the cache.

    Raises: CheckpointError saying what keeps the model from us.
    """
    from huggingface_hub import HfApi

    with HubErrors(repo):
        try:
            info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT)
        except Exception as error:
            folder = cached(repo, revision) if is_unreachable(error) else None
            if folder is None:
                raise
            return folder
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    if "config.json" not in sizes:
        raise CheckpointError(f"{repo}: the Hub has no config.json for it; choose a repository with safetensors")
    return HubModel(repo, revision, info.sha, sizes)


def cached(repo: str, revision: str | None) -> Path | None:
    """The folder of a model in the Hub's cache, if all its weights are there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    from compress.checkpoint.headers import read_headers

    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=["config.json"]))
        read_headers(folder)
    except (LocalEntryNotFoundError, OSError, CheckpointError):
        return None
    return folder if (folder / "config.json").is_file() else None


def is_unreachable(error: BaseException) -> bool:
    """Whether nobody answered, or said that they cannot for now."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code >= 500
    kinds = {kind.__name__ for kind in type(error).__mro__}  # by name: the library of requests differs between releases
    return bool(kinds & {"TransportError", "OfflineModeIsEnabled", "ConnectionError", "LocalEntryNotFoundError"})


class HubErrors:
    """Turns what the Hub's client raises into one line with a remedy."""

    def __init__(self, repo: str, kept: str | None = None):
        """`kept`: what to add where a transfer broke off."""
        self.repo, self.kept = repo, kept

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, CheckpointError) or not isinstance(error, Exception):
            return
        if isinstance(error, OSError) and error.errno in OURS:  # the disk is full, or the cache is not ours
            return
        raise CheckpointError(f"{self.repo}: {self._why(error)}") from None

    def _why(self, error: Exception) -> str:
        from huggingface_hub import errors

        local = "or download it elsewhere and give its folder"
        if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
            error = error.__cause__ if isinstance(error.__cause__, Exception) else error
        if isinstance(error, errors.HFValidationError):
            return "no such folder here, and no name that a model on the Hub can have; check the path"
        if isinstance(error, errors.GatedRepoError):
            return f"access is gated; accept its licence on {page(self.repo)}, then: hf auth login, or set HF_TOKEN, {local}"
        if isinstance(error, errors.RepositoryNotFoundError):
            return f"no such folder here and no such model on the Hub (or it is private: hf auth login, or set HF_TOKEN), {local}"
        if isinstance(error, errors.RevisionNotFoundError):
            return "the Hub has no such revision of it; check model.revision"
        if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
            return "the Hub has no safetensors weights or no config.json for it; choose a repository with safetensors"
        if isinstance(error, errors.HfHubHTTPError) and not is_unreachable(error):
            return refusal(error)
        return (
            f"{unreachable(error)}; {self.kept}"
            if self.kept
            else f"no such folder here, and {unreachable(error)}, {local}"
        )


def unreachable(error: Exception) -> str:
    """ "the Hub cannot be reached (ConnectError); check the network" """
    from huggingface_hub import constants, errors

    if isinstance(error, errors.HfHubHTTPError):
        return f"the Hub ({constants.ENDPOINT}) answers {error.response.status_code}; try again later"
    return f"the Hub cannot be reached ({type(error).__name__}); check the network"


def refusal(error: Any) -> str:
    """One line for what the Hub answered, if it is none of the usual."""
    status = error.response.status_code
    said = " ".join(str(error.response.headers.get("X-Error-Message") or error.server_message or "").split())[:200]
    if status == 401:
        return "the Hub does not know the token that was given; make a new one, then: hf auth login, or set HF_TOKEN"
    if status == 403:
        return f"the token may not do this ({said}); use one with the right to"
    if status == 429:
        return "the Hub has had too many requests from here; try again later"
    return f"the Hub answers {status} ({said}); try again later"


def page(repo: str) -> str:
    """Where a person reads about it."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}"
