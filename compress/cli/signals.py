"""Ctrl-C, SIGTERM and SIGHUP end a run in the same way: the stack unwinds, files are closed, locks are released."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ended(BaseException):
    """Somebody wants us to stop: by a signal, or by closing the pipe that we write to (SIGPIPE).

    Not an Exception, so that nobody takes it for an error to be handled; not a KeyboardInterrupt, which typer takes.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def raised() -> Iterator[None]:
    """Within it the signals raise `Ended`, unless whoever started us wants them ignored (nohup, a background job)."""

    ours = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != ours:  # a worker that a library forked: it has nothing to unwind
            os._exit(128 + number)
        raise Ended(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in ENDING:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
