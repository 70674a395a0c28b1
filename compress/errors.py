"""What can go wrong, by who can mend it. The command line prints these as one line; anything else is a bug of ours."""


class CompressError(Exception):
    """An error with a remedy. The message is one line: what is wrong, where, the value seen, the step that mends it."""


class RecipeError(CompressError):
    """The recipe, a flag or an argument asks for something that cannot be done: its author mends it."""


class CheckpointError(CompressError):
    """A file or folder is missing, damaged, foreign or cannot be written: whoever owns the files mends it."""


class NumericsError(CompressError):
    """A value is not finite, or a factorization fails: more or other calibration data, or other settings, mend it."""
