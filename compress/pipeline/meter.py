"""Where time and memory go: seconds by activity, and the peak of the memory that is really ours.

Anonymous memory is what a process cannot give back; pages of files that were read count as resident too, but the system
drops them at will. The peak is sampled, so a spike shorter than the interval can be missed.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SAMPLE_SECONDS = 0.02


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process; resident memory where the system does not tell them apart."""
    try:
        with open("/proc/self/status") as lines:
            for line in lines:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_free_memory() -> None:
    """Give memory that was freed, but that the C library keeps for later, back to the system.

    Tensors of all sizes come and go while others stay: what is left between them adds up to more than the tensors in use.
    Costs next to nothing where tensors are large, since those of 32 MiB and more are never kept. Only with glibc.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)


_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


class Meter:
    """Samples memory in the background and adds up seconds by activity, until `stop`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_bytes = anonymous_bytes()
        self.peaks: dict[str, int] = {}
        self._phase = ""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True, name="memory-meter")
        self._thread.start()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A stretch of the run that is reported with its own time and peak memory."""
        self._phase, before = name, self._phase
        self.note()
        start = time.perf_counter()
        try:
            yield
        finally:
            self.note()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self._phase = before

    def note(self) -> int:
        """Look at the memory now; returns it."""
        now = anonymous_bytes()
        self.peak_bytes = max(self.peak_bytes, now)
        if self._phase:
            self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), now)
        return now

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            self.note()


class Stopwatch:
    """Seconds by activity, for the innermost loop: `with watch("statistics"): …`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[activity] = self.seconds.get(activity, 0.0) + time.perf_counter() - start
