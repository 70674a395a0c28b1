"""Text to tokens: rows for calibration, one joined text for perplexity.

Packed rows: documents are tokenized one by one, each with the special tokens that the tokenizer adds (usually a BOS in
front; none for text files, which have no documents, and for conversations, whose template writes them), joined, and cut
into windows of `length`. Of these `samples` are drawn, one from each of `samples` equal parts of the stream. The stream
is several times longer than what is drawn, and comes from seeded random places of the data.

Padded rows: a row is one document (of a text file: a paragraph), cut off at `length`. Rows hold real tokens only;
whoever batches rows of unequal length pads them.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.calibration.documents import Source, any_text, check_data, documents, find_text, nothing_there
from compress.errors import CheckpointError, RecipeError
from compress.recipe import Calibration, Evaluation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CalibrationTokens", "check_data", "load_text", "load_tokenizer", "load_tokens"]

POOL = 4  # rows drawn from, for each row wanted: more spread, at the price of tokenizing them
BATCH_BYTES = 2**18  # documents are tokenized in batches of about this size
MIN_ROW = 2  # tokens; a shorter row has nothing to predict
CHARS_PER_TOKEN = 16  # at most, for the head of an evaluation text; English has 4


@dataclass(frozen=True)
class CalibrationTokens:
    """Rows of token ids, each a 1-D LongTensor of real tokens. Packed rows are all of one length."""

    rows: list[Tensor]
    source: str
    packing: str

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.rows]

    @property
    def n_tokens(self) -> int:
        return sum(self.lengths)

    def fingerprint(self) -> str:
        """SHA-256 of the rows."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(len(row).to_bytes(8, "little") + row.numpy().tobytes())
        return digest.hexdigest()


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`. Raises: CheckpointError saying why there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # missing or damaged files, a class that is not installed: all of them are the folder's
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{folder}: the tokenizer cannot be loaded ({type(error).__name__}: {reason}); copy the files of the "
            f"model's tokenizer into the folder"
        ) from None


def load_tokens(
    spec: Calibration, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int | None = None
) -> CalibrationTokens:
    """The rows that `spec` asks for, the same ones each time.

    Args:
        vocab_size: rows of the model's token table, to check the tokenizer against.

    Raises: RecipeError if the data cannot be read or give too few rows; CheckpointError for another model's tokenizer.
    """
    source = find_text(spec, "calibration")
    if source.chat and not getattr(tokenizer, "chat_template", None):
        raise RecipeError(
            "calibration.chat: the tokenizer has no chat template; use plain text and calibration.chat=false, or add "
            "chat_template.jinja to the model's folder"
        )
    packed = spec.packing == "packed"
    texts = _texts(source, spec, tokenizer)
    sequences = _tokenized(texts, tokenizer, special_tokens=not (source.chat or (source.is_text and packed)))
    rows = _packed(sequences, spec) if packed else _padded(sequences, spec)
    if len(rows) < spec.samples:
        raise _too_few(source, spec, len(rows))
    largest = max(int(row.max()) for row in rows)
    if vocab_size is not None and largest >= vocab_size:
        raise CheckpointError(
            f"the tokenizer gives id {largest}, the model has {vocab_size} rows of embeddings: it is another model's "
            f"tokenizer; put the right one beside the weights"
        )
    return CalibrationTokens(rows, source.name, spec.packing)


def load_text(spec: Evaluation) -> str:
    """The text of perplexity: files as they are; other documents joined by an empty line, blank ones included, which is
    what the literature does with the rows of WikiText. With `max_tokens` only as much is read as can hold so many.

    Raises: RecipeError if the data cannot be read or hold no text.
    """
    source = find_text(spec, "evaluation")
    limit = None if spec.max_tokens is None else spec.max_tokens * CHARS_PER_TOKEN
    parts, size = [], 0
    for document in documents(source, None):
        parts.append(document)
        size += len(document)
        if limit is not None and size >= limit:
            break
    text = ("" if source.is_text else "\n\n").join(parts)
    if not text.strip():
        raise nothing_there(source)
    return text


def _texts(source: Source, spec: Calibration, tokenizer: Any) -> Iterator[str]:
    for document in documents(source, spec.seed):
        if source.chat:
            yield _chat_text(document, tokenizer)
        elif not document.strip():
            continue
        elif source.is_text and spec.packing == "padded":
            yield from filter(str.strip, re.split(r"\n\s*\n", document))
        else:
            yield document


def _chat_text(messages: list[dict[str, Any]], tokenizer: Any) -> str:
    import jinja2

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False))
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise RecipeError(
            f"calibration.chat: the tokenizer's chat template refuses a conversation: {error}; roles are "
            f"{', '.join(str(m.get('role')) for m in messages[:4])}"
        ) from None


def _tokenized(texts: Iterable[str], tokenizer: Any, *, special_tokens: bool) -> Iterator[list[int]]:
    """Token ids of each text, in batches, so that a fast tokenizer can use its threads."""
    for batch in _batches(texts):
        yield from tokenizer(batch, add_special_tokens=special_tokens, verbose=False)["input_ids"]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _packed(sequences: Iterable[list[int]], spec: Calibration) -> list[Tensor]:
    """Windows of the joined tokens, one from each of `samples` equal parts; all there are, where too few."""
    wanted = spec.samples * spec.length * POOL
    stream: list[int] = []
    for ids in sequences:
        stream += ids
        if len(stream) >= wanted:
            break
    n_windows = len(stream) // spec.length
    chosen: Iterable[int] = range(n_windows)
    if n_windows > spec.samples:
        draw = random.Random(spec.seed)
        edges = [i * n_windows // spec.samples for i in range(spec.samples + 1)]
        chosen = [draw.randrange(low, high) for low, high in pairwise(edges)]
    windows = torch.tensor(stream[: n_windows * spec.length], dtype=torch.long).view(n_windows, spec.length)
    return [windows[i].clone() for i in chosen]


def _padded(sequences: Iterable[list[int]], spec: Calibration) -> list[Tensor]:
    long_enough = (ids[: spec.length] for ids in sequences if len(ids) >= MIN_ROW)
    return [torch.tensor(ids, dtype=torch.long) for ids in islice(long_enough, spec.samples)]


def _too_few(source: Source, spec: Calibration, n_rows: int) -> RecipeError:
    if n_rows == 0 and not any_text(source):
        return nothing_there(source)
    packed = spec.packing == "packed"
    kind = f"rows of {spec.length} tokens" if packed else "documents"
    shorter = ", or a smaller calibration.length" if packed else ""
    fewer = f"--set calibration.samples={n_rows}, or " if n_rows else ""
    return RecipeError(
        f"calibration.samples: {source.name} gives {n_rows} {kind}, {spec.samples} are wanted; "
        f"use {fewer}more text{shorter}"
    )
