"""What lm-eval does beside its work, brought into line: bars become our progress, log lines notes, print() nothing.

It also keeps to itself: reading a local file with `datasets` would otherwise tell a server that it did.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from compress.pipeline.progress import Progress

FLUSH_SECONDS = 0.25  # between two steps of a phase that is made of many quick ones
PHASES = {  # how a bar of the harness begins its name -> (name of the phase, unit); others are not shown
    "Checking cached requests": ("look up earlier answers", "request"),
    "Tokenizing inputs": ("tokenize", "request"),
    "Running loglikelihood requests": ("answer", "request"),
    "Running generate_until requests": ("answer", "request"),
}
BARS = ("lm_eval.api.task", "lm_eval.api.model", "lm_eval.models.huggingface")  # modules that draw bars
ANSWERED = re.compile(r"Cached requests: (\d+), Requests remaining: (\d+)")
TRUNCATED = re.compile(r"exceeds model's maximum length \((\d+)\)|Left truncation applied\..*truncating to last (\d+)")
UNSAID = ("Overwriting default num_fewshot", "Custom kwargs can be passed", "overrides existing task from")


class Phases:
    """Phases of our progress, one at a time, from bars and by hand.

    The requests of a batch are counted one by one once it is done: they are passed on as one step, else the time that is
    left would be predicted from the last ones, which take none.
    """

    def __init__(self, progress: Progress, model: str = ""):
        self.progress, self.model = progress, model
        self._open = False
        self._pending = 0
        self._flushed = 0.0

    def begin(self, phase: str, total: int, unit: str) -> None:
        self.end()
        self.progress.begin(": ".join(filter(None, [self.model, phase])), total, unit)
        self._open, self._flushed = True, time.monotonic()

    def advance(self, steps: int) -> None:
        self._pending += steps if self._open else 0

    def flush(self, seconds: float = 0.0) -> None:
        """Pass on what is done, unless the last time was less than `seconds` ago."""
        now = time.monotonic()
        if self._open and self._pending and now - self._flushed >= seconds:
            self.progress.advance(self._pending)
            self._pending, self._flushed = 0, now

    def end(self) -> None:
        self.flush()
        if self._open:
            self.progress.end()
        self._open, self._pending = False, 0


def _bar(phases: Phases) -> type:
    """A class that takes tqdm's place in a module of the harness."""

    class Bar:
        def __init__(self, iterable: Iterable[Any] | None = None, desc: str | None = None, total: int | None = None,
                     disable: bool = False, **_: Any):  # fmt: skip
            self.iterable = iterable
            self.shown = not disable
            self.phase = PHASES.get(desc or "")
            if total is None and hasattr(iterable, "__len__"):
                total = len(iterable)  # type: ignore[arg-type]
            if self.phase and self.shown:
                phases.begin(self.phase[0], total or 0, self.phase[1])

        def __iter__(self) -> Iterator[Any]:
            for item in self.iterable or ():
                yield item
                self.update()
                phases.flush(FLUSH_SECONDS)
            self.close()

        def update(self, n: int = 1) -> None:
            if self.shown:
                phases.advance(n)

        def close(self) -> None:
            if self.phase and self.shown:
                phases.end()

    return Bar


def _no_bar() -> type:
    """tqdm that draws nothing, for what imports it at the spot: bootstrapping, tasks with code of their own."""
    from tqdm import tqdm

    class NoBar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **{**options, "disable": True})

    return NoBar


class _Notes(logging.Handler):
    """What the harness warns of, as notes: each kind once, with how often it was said."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: dict[str, None] = {}
        self.truncated: Counter[str] = Counter()
        self.answered = self.asked = 0

    def emit(self, record: logging.LogRecord) -> None:
        message = " ".join(record.getMessage().split())
        if found := ANSWERED.search(message):
            self.answered += int(found[1])
            self.asked += int(found[1]) + int(found[2])
        elif found := TRUNCATED.search(message):
            self.truncated[found[1] or found[2]] += 1
        elif record.levelno >= logging.WARNING and not any(words in message for words in UNSAID):
            self.said[message] = None

    def pass_on(self, progress: Progress, model: str) -> None:
        prefix = f"{model}: " if model else ""
        if self.answered:
            progress.note(f"{prefix}{self.answered:,} of {self.asked:,} requests were answered before")
        for length, times in self.truncated.items():
            progress.note(
                f"{prefix}{times:,} requests are longer than the model's {length} positions: their beginnings were cut off"
            )
        for message in self.said:
            progress.note(f"{prefix}lm-eval: {message}")


@contextmanager
def surroundings(progress: Progress, model: str = "") -> Iterator[Phases]:
    """Within it the harness shows its progress through `progress` and is silent otherwise. `model`: named in phases."""
    phases, notes = Phases(progress, model), _Notes()
    logger, cache_logger = logging.getLogger("lm_eval"), logging.getLogger("lm_eval.api.model")
    before = (logger.propagate, logger.level, cache_logger.level)
    logger.addHandler(notes)
    logger.propagate = False
    logger.setLevel(logging.WARNING)
    cache_logger.setLevel(logging.INFO)
    stay_home()
    with _without_bars(), _replaced(_replacements(phases)), contextlib.redirect_stdout(io.StringIO()):
        try:
            yield phases
        finally:
            phases.end()
            logger.removeHandler(notes)
            logger.propagate = before[0]
            logger.setLevel(before[1])
            cache_logger.setLevel(before[2])
            notes.pass_on(progress, model)


def stay_home() -> None:
    """`datasets` counts the uses of its readers, local files included, by asking a server. Set by the user, it stays."""
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    datasets = sys.modules.get("datasets")
    if datasets is not None and os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] == "0":
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False


def _replacements(phases: Phases) -> dict[str, Any]:
    bars = {f"{module}:tqdm": _bar(phases) for module in BARS}
    return {**bars, "tqdm:tqdm": _no_bar(), "lm_eval.evaluator:get_git_commit_hash": _commit}


def _commit() -> str | None:
    """The harness's own asks git the same, and lets it complain on stderr where no repository is."""
    try:
        asked = subprocess.run(["git", "describe", "--always"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return asked.stdout.strip() or None


@contextmanager
def _replaced(attributes: dict[str, Any]) -> Iterator[None]:
    """module:attribute -> what stands there meanwhile; modules that are not imported yet are imported."""
    import importlib

    before = []
    for place, value in attributes.items():
        module = importlib.import_module(place.partition(":")[0])
        name = place.partition(":")[2]
        before.append((module, name, getattr(module, name)))
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


class _without_bars(contextlib.AbstractContextManager[None]):  # noqa: N801  # reads as a phrase
    """Bars of `datasets` and transformers off, and on again afterwards if they were."""

    def __enter__(self) -> None:
        import datasets
        from transformers.utils import logging as transformers_logging

        self.datasets = datasets.are_progress_bars_disabled()
        self.transformers = transformers_logging.is_progress_bar_enabled()
        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import datasets
        from transformers.utils import logging as transformers_logging

        if not self.datasets:
            datasets.enable_progress_bars()
        if self.transformers:
            transformers_logging.enable_progress_bar()
