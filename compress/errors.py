"""What can go wrong, by who can mend it. The command line prints these as one line; anything else is a bug of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CompressError(Exception):
    """An error with a remedy. The message is one line: what is wrong, where, the value seen, the step that mends it."""


class RecipeError(CompressError):
    """The recipe, a flag or an argument asks for something that cannot be done: its author mends it."""


class CheckpointError(CompressError):
    """A file or folder is missing, damaged, foreign or cannot be written: whoever owns the files mends it."""


class NumericsError(CompressError):
    """A value is not finite, or a factorization fails: more or other calibration data, or other settings, mend it."""


@contextmanager
def naming(what: object) -> Iterator[None]:
    """Puts the folder, or whatever else is being looked at, in front of the errors of code that does not know its name."""
    try:
        yield
    except CompressError as error:
        raise type(error)(f"{what}: {error}") from None
