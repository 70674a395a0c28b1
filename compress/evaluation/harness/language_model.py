"""Our models as the harness wants them: its own class for transformers models, around what `compress.load` gives.

Prompts, tokens, batches and scores are the harness's. Here is what it leaves to the caller with a model that is loaded
already: several processes, a batch size that the machine can hold, where progress goes, and a cache that knows the model.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.models.huggingface import HFLM

from compress import __version__
from compress.errors import CheckpointError
from compress.evaluation.harness.surroundings import Phases
from compress.runtime.prepare import arithmetic

if TYPE_CHECKING:
    import torch

BATCH_ON_CPU = 8
LARGEST_BATCH = 64  # that the harness tries by itself
COPIES_OF_LOGITS = 3  # the model's, their logarithm of the softmax, and what it is made in
HASHED = (".safetensors", ".json", ".model", ".txt", ".jinja", ".py")
VERSIONS = ("lm_eval", "torch", "transformers")
FOREVER = timedelta(weeks=52)  # a process may wait for another that has longer questions; the harness's own limit


class LanguageModel(HFLM):
    """A loaded model for the harness.

    Args:
        model, tokenizer: as loaded from `folder`.
        batch_size: a number, "auto" or "auto:N"; by default "auto" on a GPU and `BATCH_ON_CPU` elsewhere.
        accelerator: of this process, where several share the questions.
    """

    def __init__(
        self, model: Any, tokenizer: Any, folder: Path, batch_size: int | str | None = None, accelerator: Any = None
    ):
        if batch_size is None:
            batch_size = "auto" if model.device.type == "cuda" else BATCH_ON_CPU
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_batch_size=LARGEST_BATCH)
        self.folder = folder
        self.phases: Phases | None = None
        self._alone = False
        if model.device.type == "cpu":
            self.max_batch_size = self._largest_batch_on_cpu()
        if accelerator is not None:
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    @property
    def world_size(self) -> int:
        return 1 if self._alone else self._world_size

    def _largest_batch_on_cpu(self) -> int:
        """What half of the free memory holds: a CPU says nothing where a GPU is out of memory, it slows down or dies."""
        from compress.pipeline.estimate import available_memory

        logits = 4 * COPIES_OF_LOGITS * self.max_length * self.model.config.get_text_config().vocab_size
        return max(1, min(LARGEST_BATCH, available_memory() // 2 // logits))

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        if self.device.type == "cpu":
            return self.max_batch_size
        return super()._detect_batch_size(requests, pos)

    @contextmanager
    def _each_alone(self) -> Iterator[None]:
        """The processes do not wait for each other within requests: they hold whole copies of the model, and where some
        of the answers come from the cache their batches differ in number."""
        self._alone = True
        try:
            yield
        finally:
            self._alone = False

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        with self._each_alone():
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        with self._each_alone():
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """The harness shows a bar for each batch of windows: here it is one for all of them."""
        if self.phases is not None and not disable_tqdm:
            windows = sum(-(-len(self.tok_encode(r.args[0])) // self.max_length) for r in requests)
            self.phases.begin("answer", windows, "window")
        with self._each_alone():
            likelihoods = super().loglikelihood_rolling(requests, disable_tqdm=True)
        if self.phases is not None:
            self.phases.end()
        return likelihoods

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if override_bs is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm)
        done = super()._loglikelihood_tokens(requests, True, override_bs)
        if self.phases is not None:
            self.phases.advance(len(requests))
        return done

    def _model_call(self, *args: Any, **options: Any) -> torch.Tensor:
        if self.phases is not None:
            self.phases.flush()
        return super()._model_call(*args, **options)

    def _model_generate(self, *args: Any, **options: Any) -> torch.Tensor:
        if self.phases is not None:
            self.phases.flush()
        return super()._model_generate(*args, **options)

    def get_model_info(self) -> dict[str, Any]:
        """As the harness's, without asking the Hub: the commit of a snapshot is the name of its folder."""
        commit = self.folder.name if self.folder.parent.name == "snapshots" else ""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": self.model.dtype,
            "model_revision": commit or "main",
            "model_sha": commit,
        }

    @cached_property
    def cache_key(self) -> str:
        """Changes with whatever can change an answer: the files of the checkpoint, dtype, kind of device, versions."""
        digest = hashlib.sha256(checkpoint_digest(self.folder).encode())
        releases = [f"compress-llm {__version__}", *(f"{name} {version(name)}" for name in VERSIONS)]
        runs = arithmetic(self.model)
        native = [f"{runs['kernels']} {runs['activations']}"] if runs["linears"] else []
        for part in (str(self.model.dtype), self.device.type, str(self.max_length), *releases, *native):
            digest.update(b"\0" + part.encode())
        return digest.hexdigest()[:24]


def checkpoint_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of weights, configs and tokenizer. The Hub's cache names blobs by their hash."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if not file.is_file() or file.suffix not in HASHED or file.name == "compress_report.json":
            continue
        blob = file.resolve()
        digest.update(file.name.encode() + b"\0")
        if blob.parent.name == "blobs" and file.is_symlink():
            digest.update(blob.name.encode())
            continue
        with open(file, "rb") as stream:
            while block := stream.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def cache_file(cache: Path, model: LanguageModel) -> str:
    """What the harness is to call the cache of `model` in the folder `cache`; it adds `_rank0.db`.

    Raises: CheckpointError if what lies there is no cache.
    """
    prefix = cache / f"{model.folder.name}-{model.cache_key}"
    file = Path(f"{prefix}_rank{model.rank}.db")
    if file.exists():
        try:
            with sqlite3.connect(file) as connection:
                state = connection.execute("PRAGMA quick_check").fetchone()[0]
            connection.close()
        except sqlite3.Error as error:
            state = str(error)
        if state != "ok":
            raise CheckpointError(f"{file}: damaged, or no cache of answers ({state}); delete it and run again")
    return str(prefix)


def join_processes(cpu: bool) -> Any:
    """The accelerator of this process, one of several."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    return Accelerator(cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=FOREVER)])
