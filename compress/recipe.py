"""A recipe: which model, what is done to which layers, on which data, and how the result is measured and stored.

    model: meta-llama/Llama-3.1-8B-Instruct
    calibration: {data: HuggingFaceH4/ultrachat_200k, split: train_sft, chat: true, samples: 128, length: 2048}
    steps:
      - gptq: {bits: 4, group_size: 128}
        skip: "*.layers.0.*"
        overrides: {"*.down_proj": {bits: 8}}
    evaluation: {data: Salesforce/wikitext, subset: wikitext-2-raw-v1, split: test, length: 2048}

What describes the result is here; what describes the machine is on the command line. Everything is checked when the
recipe is loaded. An unknown key is an error that names the nearest known one, and every error is one line: the file,
the key, the value and the remedy. The settings of a step are those of its method's config.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    ValidationError,
    WithJsonSchema,
    field_validator,
)

from compress import patterns, shipped
from compress.errors import RecipeError
from compress.recipe_errors import Value, one_line, unknown_key
from compress.recipe_yaml import assign, parse, parse_value

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from compress.methods.base import MethodConfig

BATCH_TOKENS = 2048  # in one forward, where the recipe does not say
STEP_KEYS = ("layers", "skip", "overrides")


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


STRINGS_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
Strings = Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(min_length=1), WithJsonSchema(STRINGS_SCHEMA)]
Name = Annotated[str, Field(min_length=1)]
AUTO = r"^auto(:[1-9]\d*)?$"  # of a batch size: the harness finds it, N times in a run


class Section(BaseModel):
    """A part of the recipe: frozen, unknown keys refused, values of the type they are written in."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=False)


class Model(Section):
    """The model to compress. `model: PATH` is short for `model: {path: PATH}`."""

    path: Name = Field(description="a local folder, a Hub id, or `shipped`")
    revision: str | None = Field(None, description="branch, tag or commit on the Hub")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype in which float tensors are stored; auto: as in the checkpoint"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")


class Data(Section):
    """Where text comes from."""

    default_split: ClassVar[str] = "train"
    data: Strings | None = None
    split: str | None = Field(None, description="split of a Hub data set [default: train; evaluation: test]")
    subset: str | None = Field(None, description="configuration of a Hub data set")
    column: str | None = Field(
        None, description="the column that holds the text; found by itself if there is one candidate"
    )


class Calibration(Data):
    """The tokens whose activations the methods see."""

    data: Strings | None = Field(
        None, description="a Hub data set, files (.txt .jsonl .json .parquet; globs allowed), or `shipped`"
    )
    chat: bool = Field(
        False, description="the column holds conversations, to be written out by the tokenizer's chat template"
    )
    samples: int = Field(128, ge=1, description="number of rows")
    length: int = Field(2048, ge=2, description="tokens per row; padded: at most so many")
    seed: int = Field(0, ge=0, description="chooses the rows")
    packing: Literal["packed", "padded"] = Field(
        "packed", description="packed: documents joined and cut into rows; padded: a row is one document"
    )
    batch_size: int | None = Field(
        None,
        ge=1,
        description="rows that run together, which also fixes the order of summation [default: 2048 tokens' worth]",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="dtype of the calibration pass; auto: float32 on CPU, the model's on GPU"
    )

    @property
    def rows_per_batch(self) -> int:
        """`batch_size`, or what keeps a batch's activations small beside a block while products stay efficient."""
        return self.batch_size or max(1, BATCH_TOKENS // self.length)


class Evaluation(Data):
    """Perplexity before and after, on joined text."""

    default_split: ClassVar[str] = "test"
    data: Strings = Field(("shipped",), description="a Hub data set, files, or `shipped`")
    length: int | None = Field(None, ge=2, description="tokens per window [default: 2048 or the model's limit]")
    stride: int | None = Field(
        None, ge=1, description="tokens between windows [default: length, so they do not overlap]"
    )
    max_tokens: int | None = Field(None, ge=2, description="use the head of the text only")
    reference: bool = Field(
        True, description="also KL divergence, top-1 agreement and error by block beside the original"
    )
    speed: bool = Field(False, description="also tokens per second of both, each whole in memory, as `compress bench`")
    tasks: Strings | None = Field(
        None, description="also these tasks, groups or YAML files of lm-eval, on the original and the result"
    )
    include_path: Strings | None = Field(None, description="folders of further tasks")
    num_fewshot: int | None = Field(
        None, ge=0, description="solved examples in front of each question [default: as the task says]"
    )
    limit: float | None = Field(
        None, gt=0, description="so many questions of each task; below 1 a share of them [default: all]"
    )
    batch_size: Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern=AUTO)] | None = Field(
        None, description="requests that run together: a number or auto [default: auto on GPU, 8 on CPU]"
    )
    apply_chat_template: bool = Field(False, description="put the questions as messages of a chat")


class PushToHub(Section):
    """The repository on the Hub that a finished result goes to. `push_to_hub: OWNER/NAME` is short for its `repo`."""

    repo: Name = Field(description="owner/name, or a name of one's own")
    private: bool = Field(True, description="of a repository that is made; one that exists stays as it is")
    revision: str | None = Field(None, description="a branch, made if it is not there [default: main]")
    base_model: str | None = Field(
        None, description="id of the base model on the Hub, where the model is a local folder"
    )
    overwrite: bool = Field(False, description="replace another model that the repository holds")


class Output(Section):
    """Where the result goes, and as what."""

    path: Name | None = Field(None, description="folder of the result; --out on the command line wins")
    format: Literal["auto", "compressed-tensors", "compress"] = Field(
        "auto", description="auto: compressed-tensors where it can hold the result, else our own format"
    )
    push_to_hub: PushToHub | None = Field(
        None, description="publish the finished result: owner/name, or a section as below; false: do not"
    )

    @field_validator("push_to_hub", mode="before")
    @classmethod
    def _short_push(cls, value: Any) -> Any:
        return None if value is False else {"repo": value} if isinstance(value, str) else value


@dataclass(frozen=True)
class Step:
    """One method, its settings, and the layers that it applies to. Patterns are those of `compress.patterns`."""

    method: str
    config: MethodConfig
    layers: tuple[str, ...] | None = None  # None: every linear of the decoder blocks
    skip: tuple[str, ...] = ()
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def configs(self, names: Sequence[str], *, where: str = "steps") -> dict[str, MethodConfig]:
        """Layer -> settings, overrides applied; where several patterns match a layer, later ones win key by key.

        Raises: RecipeError for an override that matches none of `names`.
        """
        for pattern in self.overrides:
            patterns.require_match(pattern, names, f"{where}.overrides")
        made: dict[tuple[str, ...], MethodConfig] = {(): self.config}
        result = {}
        for name in names:
            key = tuple(pattern for pattern in self.overrides if patterns.matches(pattern, name))
            if key not in made:
                changes = {k: v for pattern in key for k, v in self.overrides[pattern].items()}
                made[key] = _settings(type(self.config), {**self._given, **changes}, f"{where}.overrides.{key[-1]}")
            result[name] = made[key]
        return result

    @property
    def _given(self) -> dict[str, Any]:
        return self.config.model_dump(mode="json", exclude_unset=True)

    def to_dict(self) -> dict[str, Any]:
        """As it is written in YAML, every setting spelled out."""
        written: dict[str, Any] = {self.method: self.config.model_dump(mode="json")}
        if self.layers is not None:
            written["layers"] = list(self.layers)
        if self.skip:
            written["skip"] = list(self.skip)
        if self.overrides:
            written["overrides"] = {pattern: dict(settings) for pattern, settings in self.overrides.items()}
        return written

    @classmethod
    def from_dict(cls, written: Any, where: str) -> Step:
        """`{method: {settings}, layers, skip, overrides}`. Raises: RecipeError: `where`, the key and the value."""
        from compress.methods import find

        if not isinstance(written, dict):
            raise RecipeError(f"{where}: expected 'method: {{settings}}', got {Value(written)}")
        method = _method_key(written, where)
        try:
            config = find(method).Config
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from None
        settings = {} if written[method] is None else written[method]
        base = _settings(config, settings, f"{where}.{method}")
        overrides = written.get("overrides") or {}
        if not isinstance(overrides, dict):
            raise RecipeError(f"{where}.overrides: expected 'pattern: {{settings}}', got {Value(overrides)}")
        for pattern, changes in overrides.items():
            at = f"{where}.overrides.{pattern}"
            _patterns(pattern, at)
            if not isinstance(changes, dict) or not changes:
                raise RecipeError(f"{at}: expected settings of {method}, got {Value(changes)}")
            _settings(config, {**settings, **changes}, at)
        layers, skip = written.get("layers"), written.get("skip")
        return cls(
            method, base, None if layers is None else _patterns(layers, f"{where}.layers"),
            () if skip is None else _patterns(skip, f"{where}.skip"), overrides,
        )  # fmt: skip


def _method_key(written: dict[str, Any], where: str) -> str:
    """The one key of a step that names its method."""
    from compress.methods import names

    keys = [str(key) for key in written if key not in STEP_KEYS]
    if len(keys) == 1:
        return keys[0]
    known = [key for key in keys if key in names()]
    if len(known) == 1:  # the others are slips, or settings one level too high
        wrong = next(key for key in keys if key != known[0])
        raise RecipeError(f"{where}: {unknown_key(wrong, STEP_KEYS)}; settings go under {known[0]!r}")
    found = f"it has {', '.join(map(repr, keys))}" if keys else "it has none"
    raise RecipeError(f"{where}: a step names one method ({', '.join(names())}); {found}")


def _patterns(value: Any, where: str) -> tuple[str, ...]:
    listed = _as_tuple(value)
    if not isinstance(listed, tuple) or not listed or not all(isinstance(p, str) for p in listed):
        raise RecipeError(f"{where}: expected a pattern or a list of patterns, got {Value(value)}")
    for pattern in listed:
        try:
            patterns.compiled(pattern)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from None
    return listed


def _settings(config: type[MethodConfig], settings: Any, where: str) -> MethodConfig:
    """Settings of a method, from YAML: as strict as JSON, so that `true` is no number and "4" neither."""
    if not isinstance(settings, dict):
        raise RecipeError(f"{where}: expected {{settings}}, got {Value(settings)}")
    try:
        return config.model_validate_json(json.dumps(settings, default=str), strict=True)
    except ValidationError as error:
        raise RecipeError(one_line(error, config, where)) from None


class Recipe(Section):
    """What to compress, how, on which data, how to measure it. Made by `Recipe.load` or `Recipe.from_dict`."""

    model: Model = Field(description="the model to compress: a folder, a Hub id, or `shipped`")
    calibration: Calibration = Field(default_factory=Calibration)
    steps: tuple[InstanceOf[Step], ...] = Field(min_length=1, description="what is done, in this order")
    evaluation: Evaluation | None = Field(None, description="false, or left out: the result is not measured")
    output: Output = Field(default_factory=Output)
    seed: int = Field(0, ge=0, description="of everything random outside the choice of calibration rows")

    @field_validator("model", mode="before")
    @classmethod
    def _short_model(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("evaluation", mode="before")
    @classmethod
    def _no_evaluation(cls, value: Any) -> Any:
        return None if value is False else value

    @field_validator("calibration", "output", mode="before")
    @classmethod
    def _left_empty(cls, value: Any) -> Any:
        return {} if value is None else value  # `calibration:` with nothing under it

    @field_validator("steps", mode="before")
    @classmethod
    def _steps(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            raise RecipeError(f"steps: expected a list ('- gptq: {{bits: 4}}'), got {Value(value)}")
        return tuple(s if isinstance(s, Step) else Step.from_dict(s, f"steps.{i}") for i, s in enumerate(value))

    @classmethod
    def from_dict(cls, written: Any, *, source: str = "recipe") -> Recipe:
        """A recipe from what YAML gives. Raises: RecipeError, one line that begins with `source` and the key."""
        if not isinstance(written, dict):
            raise RecipeError(f"{source}: expected 'model:', 'steps:' and so on, got {Value(written)}")
        try:
            return cls.model_validate(written)
        except ValidationError as error:
            raise RecipeError(f"{source}: {one_line(error, cls)}") from None
        except RecipeError as error:
            raise RecipeError(f"{source}: {error}") from None

    @classmethod
    def load(cls, name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """A recipe from a file, else the shipped recipe of that name, with `a.b=c` overrides applied.

        Raises: RecipeError naming the file, and the line or the key.
        """
        path = find_recipe(name)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: cannot be read: {error}") from None
        written = parse(text, str(path))
        for override in overrides:
            key, equals, value = override.partition("=")
            if not equals or not key.strip():
                raise RecipeError(f"--set {override}: expected KEY=VALUE, such as steps.0.gptq.bits=3")
            written = assign(written, key.strip(), parse_value(value, f"--set {override}"), f"--set {override}")
        return cls.from_dict(written, source=str(path))

    def to_dict(self) -> dict[str, Any]:
        """As it is written in YAML, every default spelled out."""
        written = self.model_dump(mode="json", exclude={"steps"}, exclude_none=True)
        order = [name for name in type(self).model_fields if name in written or name == "steps"]
        written["steps"] = [step.to_dict() for step in self.steps]
        return {name: written[name] for name in order}

    def to_yaml(self) -> str:
        """The recipe in full; loading it gives an equal recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)

    def hash(self) -> str:
        """SHA-256 of what describes the result: not of the evaluation, nor of where the result goes. Writing a default
        out changes nothing."""
        described = {k: v for k, v in self.to_dict().items() if k != "evaluation"}
        described["output"] = {"format": self.output.format}
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def find_recipe(name: str | Path) -> Path:
    """The file `name`, else the shipped recipe `name`, with or without `.yaml`.

    Raises: RecipeError with the nearest shipped recipe.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = shipped.recipes()
    stem = path.name.removesuffix(".yaml").removesuffix(".yml")
    if stem in known and path.parent.name in ("", "recipes"):
        return known[stem]
    if path.is_dir():
        raise RecipeError(f"{path}: is a folder; name a recipe file, or a shipped recipe: {', '.join(known)}")
    near = difflib.get_close_matches(stem, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"shipped recipes: {', '.join(known)}"
    raise RecipeError(f"{name}: no such file, and no shipped recipe of that name; {hint}")
