"""YAML as recipes need it: a repeated key is an error, `1e-3` is a number, syntax errors are one line; and `a.b=c`."""

from __future__ import annotations

import re
from typing import Any

import yaml

from compress.errors import RecipeError
from compress.recipe_errors import Value

# YAML 1.1, which PyYAML follows, takes `1e-3` for a string: it wants a dot and a sign.
FLOAT = re.compile(
    r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
SEGMENT = re.compile(r'"([^"]*)"|\'([^\']*)\'|([^.]+)')
SHORTHAND = {
    "model": "path",
    "output.push_to_hub": "repo",
}  # `model: PATH` becomes a mapping once another of its keys is set


class _Loader(yaml.SafeLoader):
    """SafeLoader with its own table of resolvers, so that other users of PyYAML keep theirs."""

    yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:float"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"a key must be text, not {Value(key)}", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands here twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


def parse(text: str, source: str) -> Any:
    """The value of a YAML document. Raises: RecipeError naming `source` and the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}{_place(error)}: not valid YAML: {_problem(error)}") from None


def parse_value(text: str, source: str) -> Any:
    """The value of `--set key=TEXT`, typed as YAML does: 3 is a number, true a flag, [a, b] a list."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        if text.startswith("*"):
            return text  # a glob, which YAML takes for a reference
        raise RecipeError(f"{source}: the value is not valid YAML: {_problem(error)}; quote it") from None


def _place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""


def _problem(error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    text = " ".join(str(problem).split())
    if "cannot start any token" in text:
        text += " (quote values that begin with a special sign)"
    if "alias" in f"{text} {getattr(error, 'context', None)}":
        text += " (quote patterns that begin with '*')"
    return text


def assign(written: Any, dotted: str, value: Any, source: str) -> Any:
    """`written` with the value at `dotted` replaced: `steps.0.gptq.bits`. Keys that hold dots are quoted:
    `steps.0.overrides."*.down_proj".bits`.

    Raises: RecipeError naming the part that is not there.
    """
    keys = ["".join(groups) for groups in SEGMENT.findall(dotted)]
    return _assigned(written, keys, value, [], source)


def _assigned(written: Any, keys: list[str], value: Any, done: list[str], source: str) -> Any:
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    here = ".".join(done)
    if isinstance(written, list):
        index = int(key) if re.fullmatch(r"-?\d+", key) else None
        if index is None or not -len(written) <= index < len(written):
            places = f"0 to {len(written) - 1}" if written else "none, it is empty"
            raise RecipeError(f"{source}: {here} is a list, {key!r} no place in it; places: {places}")
        changed = list(written)
        changed[index] = _assigned(changed[index], rest, value, [*done, key], source)
        return changed
    if written is None or written is False:
        written = {}
    if isinstance(written, str) and here in SHORTHAND:
        written = {SHORTHAND[here]: written}
    if not isinstance(written, dict):
        raise RecipeError(f"{source}: {here} is {Value(written)}, which has no key {key!r}")
    return {**written, key: _assigned(written.get(key), rest, value, [*done, key], source)}
