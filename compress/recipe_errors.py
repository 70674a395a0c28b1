"""What pydantic finds wrong, as one line: the key, what was expected, the value, and the nearest known key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

LONGEST_VALUE = 60  # characters of a value that a message repeats


class Value:
    """Prints a value in a message: as Python writes it, and cut where it is long."""

    def __init__(self, value: Any):
        self.value = value

    def __str__(self) -> str:
        if self.value is None:
            return "nothing"
        text = " ".join(repr(self.value).split())
        return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 1] + "…"


def unknown_key(key: Any, known: Iterable[str]) -> str:
    """ "unknown key 'sampels'; did you mean 'samples'?", or the list of those known."""
    known = list(known)
    near = difflib.get_close_matches(str(key), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return f"unknown key {Value(key)}; {hint}"


def one_line(error: ValidationError, model: type[BaseModel], where: str = "") -> str:
    """The first problem of `error`, which came from validating `model` at `where`. Unknown keys come first: they are
    often why another one is missing."""
    problems = error.errors(include_url=False)
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    location = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        section = _model_at(model, location[:-1])
        path = ".".join(filter(None, [where, *location[:-1]]))
        return ": ".join(filter(None, [path, unknown_key(location[-1], section.model_fields if section else ())]))
    path = ".".join(filter(None, [where, *location]))
    if problem["type"] == "missing":
        section = _model_at(model, location[:-1])
        about = (
            section.model_fields[location[-1]].description if section and location[-1] in section.model_fields else None
        )
        return f"{path}: is missing" + (f" ({about})" if about else "")
    if problem["type"] == "json_invalid":
        return f"{path}: {problem['msg']}"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    message = f"{message[0].lower()}{message[1:]}"
    if problem["type"] in ("value_error", "assertion_error"):
        return f"{path}: {message}"  # a validator's own sentence says the value itself
    if problem["type"] in ("too_short", "string_too_short") and not problem["input"]:
        return f"{path}: should not be empty"
    if problem["type"] in ("model_type", "model_attributes_type", "dict_type"):
        message = "should be a mapping of keys to values"
    return f"{path}: {message}, not {Value(problem['input'])}"


def _model_at(model: type[BaseModel], location: list[str]) -> type[BaseModel] | None:
    """The model that lies at `location`, through optional fields."""
    found: type[BaseModel] | None = model
    for part in location:
        field = found.model_fields.get(part) if found else None
        if field is None:
            return None
        kinds = [field.annotation, *get_args(field.annotation)]
        found = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
    return found
