"""Documents, one after the other, from files, the Hub or the text that ships with the package.

Nothing is read before it is asked for: who wants 128 rows of a 10 GB file reads a few megabytes of it. With a seed,
files are read in small pieces in a seeded random order, so that any head of the stream is spread over the whole;
without one, in the order in which they stand.

    .txt .raw .md .tokens    text; a document is a piece of the file, cut at a line border
    .jsonl .ndjson           a JSON object (or string) per line; a document is one
    .json                    a list of objects or strings
    .parquet                 a document per row
"""

from __future__ import annotations

import glob
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from compress import shipped
from compress.errors import RecipeError
from compress.recipe import Calibration, Data
from compress.recipe_errors import Value

TEXT = (".txt", ".raw", ".md", ".tokens")
LINES = (".jsonl", ".ndjson")
SUFFIXES = (*TEXT, *LINES, ".json", ".parquet")

TEXT_COLUMNS = ("text", "content", "document", "article", "body", "story", "page")
CHAT_COLUMNS = ("messages", "conversations", "conversation", "chat")

PIECE_BYTES = 16 * 1024  # about two rows of 2048 tokens: small, so that few megabytes come from many places
MAX_PIECES = 2**20
BORDER_BYTES = 4096  # how far a piece looks for a line border before it settles for a space
MAX_JSON_BYTES = 2**30  # a .json file must be parsed whole
SHUFFLE_ROWS = 1024  # rows of a streamed Hub data set among which the next one is drawn
HUB_SECONDS = 10.0  # until the Hub begins to answer
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """Where `spec` says that text lies: files that exist, or a data set on the Hub."""

    spec: Data
    where: str  # "calibration" or "evaluation", for messages
    files: tuple[Path, ...] = ()
    hub: str | None = None

    @property
    def name(self) -> str:
        return self.hub or ", ".join(map(str, self.files))

    @property
    def is_text(self) -> bool:
        """Whether documents have no borders: one text, from files that hold nothing else."""
        return bool(self.files) and all(path.suffix in TEXT for path in self.files)

    @property
    def chat(self) -> bool:
        return isinstance(self.spec, Calibration) and self.spec.chat


def find_text(spec: Data, where: str) -> Source:
    """Settle what the names in `spec.data` are. Raises: RecipeError for what is no file and no name of a data set."""
    if spec.data is None:
        raise RecipeError(
            f"{where}.data: is missing, and this recipe needs text; name a Hub data set, files (.txt, .jsonl, "
            f".parquet) or the text that ships with the package: --set {where}.data={shipped.NAME}"
        )
    files: list[Path] = []
    for name in spec.data:
        if name == shipped.NAME:
            calibration = isinstance(spec, Calibration)
            files.append(shipped.calibration_text_path() if calibration else shipped.heldout_text_path())
            continue
        found = [Path(path) for path in sorted(glob.glob(os.path.expanduser(name), recursive=True))]
        exact = Path(name).expanduser()
        found = [exact] if exact.exists() else found
        if not found and len(spec.data) == 1 and exact.suffix not in SUFFIXES and HUB_ID.fullmatch(name):
            return Source(spec, where, hub=name)
        if not found:
            raise RecipeError(
                f"{where}.data: no file {name!r}; check the path, or use --set {where}.data={shipped.NAME}"
            )
        files += found
    for path in files:
        _check_file(path, where)
    source = Source(spec, where, tuple(files))
    if source.chat and source.is_text:
        raise RecipeError(
            f"{where}.chat: {source.name} is plain text; conversations come from .jsonl, .json or .parquet"
        )
    return source


def _check_file(path: Path, where: str) -> None:
    if path.is_dir():
        raise RecipeError(f"{where}.data: {path} is a folder; name the files in it, such as {path}/*.jsonl")
    if path.suffix not in SUFFIXES:
        raise RecipeError(f"{where}.data: {path}: unknown kind of file {path.suffix!r}; known: {', '.join(SUFFIXES)}")
    try:
        if path.stat().st_size == 0:
            raise RecipeError(f"{where}.data: {path} is empty")
        path.open("rb").close()
    except OSError as error:
        raise RecipeError(f"{where}.data: {path} cannot be read: {error.strerror}") from None


def documents(source: Source, seed: int | None) -> Iterator[Any]:
    """Texts, blank ones included; of chat data, lists of messages. `seed` None: in order.

    Raises: RecipeError naming file and place, missing columns, or what keeps the Hub from answering.
    """
    records = _hub_records(source, seed) if source.hub else _file_records(source, seed)
    for record in records:
        if source.chat:
            if record:
                yield _messages(record, source)
        elif isinstance(record, str):
            yield record
        elif isinstance(record, (list, dict)):
            raise RecipeError(
                f"{source.where}: {source.name}: the column holds {type(record).__name__} values, not text; "
                f"name another one with {source.where}.column, or for conversations set calibration.chat=true"
            )
        elif record is not None:
            raise RecipeError(f"{source.where}: {source.name}: expected text, got {Value(record)}")


def check_data(spec: Data, where: str) -> None:
    """Settle the data and read one document, so that a run does not end at it. Raises: RecipeError."""
    source = find_text(spec, where)
    if not any_text(source):
        raise nothing_there(source)


def any_text(source: Source) -> bool:
    """Whether there is a document that is not blank."""
    return any(document if source.chat else document.strip() for document in documents(source, None))


def nothing_there(source: Source) -> RecipeError:
    return RecipeError(f"{source.where}.data: {source.name} holds no text: every document is empty")


# --- files ---


def _file_records(source: Source, seed: int | None) -> Iterator[Any]:
    """Records of all files, piece by piece; pieces of all files in one seeded order."""
    total = sum(path.stat().st_size for path in source.files)
    piece = max(PIECE_BYTES, -(-total // MAX_PIECES))
    readers: list[Callable[[], Iterable[Any]]] = []
    for path in source.files:
        readers += _pieces(path, source, piece)
    if seed is not None:
        random.Random(seed).shuffle(readers)
    for read in readers:
        yield from read()


def _pieces(path: Path, source: Source, piece: int) -> list[Callable[[], Iterable[Any]]]:
    """Functions that each read one piece of `path`; together they read all of it once."""
    if path.suffix == ".json":
        return _json_pieces(path, source)
    if path.suffix == ".parquet":
        return _parquet_pieces(path, source)
    size = path.stat().st_size
    read = _text_piece if path.suffix in TEXT else _lines_piece
    return [
        lambda start=start: read(path, start, min(start + piece, size), source)  # type: ignore[misc]
        for start in range(0, size, piece)
    ]


def _text_piece(path: Path, start: int, end: int, source: Source) -> list[str]:
    with path.open("rb") as file:
        start, end = _border(file, start), _border(file, end)
        file.seek(start)
        raw = file.read(end - start)
    try:
        text = raw.decode("utf-8-sig" if start == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{source.where}.data: {path} is not UTF-8 text (byte {start + error.start}); convert it: "
            f"iconv -f LATIN1 -t UTF-8"
        ) from None
    text = text.replace("\r\n", "\n")
    last_of_several = len(source.files) > 1 and end == path.stat().st_size
    return [text + "\n\n" if last_of_several else text]


def _border(file: BinaryIO, position: int) -> int:
    """The first line border at or after `position`, else a space, else a border between characters."""
    if position == 0:
        return 0
    file.seek(position - 1)
    window = file.read(BORDER_BYTES)
    for mark in (b"\n", b" "):
        found = window.find(mark)
        if found >= 0:
            return position + found
    at = 1
    while at < len(window) and window[at] & 0xC0 == 0x80:  # inside a character of UTF-8
        at += 1
    return position - 1 + at


def _lines_piece(path: Path, start: int, end: int, source: Source) -> Iterator[Any]:
    """The records whose lines begin in [start, end)."""
    with path.open("rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()
        while (at := file.tell()) < end:
            line = file.readline()
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise RecipeError(f"{source.where}.data: {path}, line at byte {at}: not JSON: {error}") from None
            yield _field(record, source, path)


def _json_pieces(path: Path, source: Source) -> list[Callable[[], Iterable[Any]]]:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise RecipeError(f"{source.where}.data: {path}: too large to read whole; write one object per line, as .jsonl")
    try:
        records = json.loads(path.read_bytes())
    except ValueError as error:
        raise RecipeError(
            f"{source.where}.data: {path}: not JSON: {error}; one object per line is called .jsonl"
        ) from None
    if not isinstance(records, list):
        raise RecipeError(f"{source.where}.data: {path}: expected a list of objects, got {Value(records)}")
    return [lambda record=record: [_field(record, source, path)] for record in records]  # type: ignore[misc]


def _parquet_pieces(path: Path, source: Source) -> list[Callable[[], Iterable[Any]]]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        names = parquet.read_schema(path).names
        groups = parquet.read_metadata(path).num_row_groups
    except (pyarrow.ArrowException, OSError) as error:
        raise RecipeError(f"{source.where}.data: {path}: not a Parquet file: {str(error).splitlines()[0]}") from None
    column = choose_column(names, source, str(path))

    def read(group: int) -> Iterator[Any]:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=SHUFFLE_ROWS, row_groups=[group], columns=[column]):
                yield from batch.column(0).to_pylist()

    return [lambda group=group: read(group) for group in range(groups)]  # type: ignore[misc]


def _field(record: Any, source: Source, path: Path) -> Any:
    if isinstance(record, str) and not source.chat:
        return record
    if not isinstance(record, dict):
        raise RecipeError(f'{source.where}.data: {path}: expected objects such as {{"text": …}}, got {Value(record)}')
    return record[choose_column(list(record), source, str(path))]


# --- columns ---


def choose_column(columns: list[str], source: Source, name: str) -> str:
    """The column asked for, else the usual one. Raises: RecipeError listing the columns."""
    wanted, where = source.spec.column, source.where
    shown = ", ".join(columns)
    if wanted is not None:
        if wanted not in columns:
            raise RecipeError(f"{where}.column: {name} has no column {wanted!r}; columns: {shown}")
        return wanted
    usual = CHAT_COLUMNS if source.chat else TEXT_COLUMNS
    for column in usual:
        if column in columns:
            return column
    if len(columns) == 1 and columns[0] not in CHAT_COLUMNS:
        return columns[0]
    hint = ""
    if not source.chat and any(column in columns for column in CHAT_COLUMNS):
        hint = "; for conversations set calibration.chat=true"
    raise RecipeError(f"{where}.column: {name} has none of {', '.join(usual)}; name one of its columns: {shown}{hint}")


ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}


def _messages(record: Any, source: Source) -> list[dict[str, Any]]:
    """A conversation as chat templates want it; the other common form, {from, value}, is rewritten."""
    listed = isinstance(record, list) and all(isinstance(message, dict) for message in record)
    if listed and all("role" in message and "content" in message for message in record):
        return list(record)
    if listed and all("from" in message and "value" in message for message in record):
        return [{"role": ROLES.get(m["from"], m["from"]), "content": m["value"]} for m in record]
    raise RecipeError(
        f"{source.where}.chat: {source.name}: expected a list of {{role, content}} messages, got {Value(record)}; "
        f"for plain text set calibration.chat=false"
    )


# --- the Hub ---


def _hub_records(source: Source, seed: int | None) -> Iterator[Any]:
    spec = source.spec
    split = spec.split or spec.default_split
    try:
        import datasets
        from huggingface_hub import constants

        offline = constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE
        if not offline:
            _ask_hub(source)
        rows = datasets.load_dataset(source.hub, spec.subset, split=split, streaming=not offline)
        if seed is not None:
            rows = rows.shuffle(seed=seed) if offline else rows.shuffle(seed=seed, buffer_size=SHUFFLE_ROWS)
        iterator = iter(rows)
        first = next(iterator, None)
    except Exception as error:  # whatever the network, the Hub or the data set's own files raise
        raise _hub_error(source, split, error) from None
    if first is None:
        return
    column = choose_column(list(first), source, source.name)
    yield first[column]
    while True:
        try:
            row = next(iterator, None)
        except Exception as error:
            raise _hub_error(source, split, error) from None
        if row is None:
            return
        yield row[column]


def _ask_hub(source: Source) -> None:
    """One question to the Hub, which raises at once what `datasets` would find out after many retries."""
    from huggingface_hub import HfApi

    HfApi().dataset_info(str(source.hub), timeout=HUB_SECONDS)


def _hub_error(source: Source, split: str, error: Exception) -> RecipeError:
    from compress.checkpoint.hub import is_unreachable, unreachable

    where = source.where
    files = (
        f"use files: --set {where}.data=FILE.jsonl (or .txt, .parquet), or the text that ships with the package: "
        f"--set {where}.data={shipped.NAME}"
    )
    subset = f", subset {source.spec.subset!r}" if source.spec.subset else ""
    what = f"{where}.data: data set {source.hub!r} (split {split!r}{subset}) cannot be loaded from the Hub"
    if is_unreachable(error):
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            return RecipeError(f"{what}: HF_HUB_OFFLINE is set, and it is not in the cache; unset it, or {files}")
        cache = "or set HF_HUB_OFFLINE=1 if it was downloaded before"
        return RecipeError(f"{what}: {unreachable(error)}, {cache}, or {files}")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {' '.join(lines)}" if lines else type(error).__name__
    reason = reason if len(reason) <= 300 else reason[:299] + "…"
    return RecipeError(f"{what}: {reason}; check name, subset and split, or {files}")
