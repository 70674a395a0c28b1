"""The JSON of reports, described: docs/report.schema.json is made from these classes, and the tests hold real reports to it.

A report of schema 1 lacked "kind", "created", "versions", "recipe", "size", and "hidden_states" and "speed" of evaluations.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel

Path = str


class Part(BaseModel):
    """No key that is not described."""

    model_config = ConfigDict(extra="forbid")


class Text(Part):
    """What perplexity was measured on."""

    data: list[str] = Field(description="files, a Hub data set, or `shipped`")
    windows: int = Field(description="windows that the text was cut into")
    length: int = Field(description="tokens of a window")
    stride: int = Field(description="tokens between the beginnings of windows")
    text_tokens: int = Field(description="tokens of the whole text")
    text_bytes: int = Field(description="bytes of the whole text")
    begins_with_bos: bool = Field(description="whether the tokenizer puts a token for the beginning")


class Scores(Part):
    """How well a model predicts the text."""

    path: Path
    perplexity: float | None = Field(None, description="exp of the mean negative log-likelihood per token")
    nll_per_token: float | None = Field(None, description="mean negative log-likelihood per token, in nats")
    bits_per_byte: float | None = Field(None, description="the same in bits, per byte of text")
    scored_tokens: int | None = Field(None, description="tokens that were predicted")


class Fidelity(Part):
    """The model's next-token distributions beside the original's, at every position."""

    kl_mean: float = Field(description="KL divergence from the original's distribution to the model's, in nats, mean")
    kl_median: float
    kl_p99: float = Field(description="99th percentile over positions")
    kl_max: float
    top1_agreement: float = Field(description="share of positions where both find the same token most likely")
    positions: float


class Block(Part):
    """Hidden states behind one decoder block: |model - original| / |original| and cosine, means over tokens."""

    block: int
    relative_error: float = Field(description="each model on its own stream: errors of all blocks up to this one")
    cosine: float
    local_relative_error: float = Field(description="the compressed block on the original's input: this block alone")
    local_cosine: float


class HiddenStates(Part):
    """Error by block."""

    reason: str | None = Field(description="why there are none: the models do not correspond block by block")
    tokens: int = Field(description="tokens that the errors on the models' own streams are means over")
    local_tokens: int = Field(description="tokens that the errors of blocks alone are means over")
    worst: list[int] = Field(description="blocks by their own error, the largest first")
    blocks: list[Block]


class Rate(Part):
    """Tokens per second of all sequences of the batch together."""

    tokens_per_second: float = Field(description="median over rounds")
    min: float
    max: float
    rounds: list[float]


class Timed(Part):
    """One model, timed in a process of its own."""

    path: Path
    load_seconds: float
    bytes_in_memory: int = Field(description="parameters as loaded, packed where compressed")
    bytes_of_weight_files: int
    arithmetic: str | None = Field(None, description="the native kernels of its quantized layers; null: torch alone")
    peak_resident_bytes: int = Field(description="the most memory the process had")
    resident_bytes_before: int = Field(description="the most it had before the model was loaded")
    peak_cuda_bytes: int | None = Field(description="the most memory allocated on the GPU; null on a CPU")
    prefill: Rate
    decode: Rate


class SpeedSettings(Part):
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    repeats: int


class SpeedMachine(Part):
    device: str
    device_name: str
    threads: int
    torch: str
    dtype: str
    attention: str


class Ratio(Part):
    """Median over rounds of model / original in tokens per second: above 1 the model is quicker."""

    prefill: float
    decode: float


class Speed(Part):
    """What `compress bench` measures."""

    settings: SpeedSettings
    machine: SpeedMachine
    reference: Timed | None = None
    model: Timed
    ratio: Ratio | None = None


class Tasks(Part):
    """Benchmarks, in lm-eval's own form."""

    model: dict[str, Any]
    reference: dict[str, Any] | None = None
    comparison: list[dict[str, Any]] | None = None


class Measured(Part):
    """What an evaluation found. Of two models, `reference` is the original."""

    text: Text | None = None
    reference: Scores | None = None
    model: Scores | None = None
    fidelity: Fidelity | None = None
    hidden_states: HiddenStates | None = None
    speed: Speed | None = None
    tasks: Tasks | None = None


class Bytes(Part):
    """Sizes of one model."""

    bytes_on_disk: int | None = Field(
        description="all files of the folder but reports; null where it is on the Hub only"
    )
    bytes_tensors: int = Field(description="all tensors, as stored")
    bytes_in_memory: int = Field(description="parameters when loaded, packed where compressed")


class KindBytes(Part):
    """All layers of a kind: the last part of their names."""

    kind: str
    layers: int | None
    weights: int | None
    bytes: int
    bytes_reference: int | None


class LayerBytes(Part):
    """One matrix: a linear, or the token table."""

    name: str
    kind: str
    block: int | None
    weights: int
    bytes: int
    bytes_reference: int | None
    bits_per_weight: float


class Size(Part):
    """Where the bytes are, by the headers of the files."""

    model: Bytes
    reference: Bytes | None
    kinds: list[KindBytes]
    layers: list[LayerBytes]


class Machine(Part):
    platform: str
    threads: int


class Frame(Part):
    """What every report begins with."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    schema_: Literal[2] = Field(alias="schema", description="version of this schema")
    created: str = Field(description="when, in ISO 8601")
    versions: dict[str, str] = Field(description="of compress-llm, python, torch, transformers")
    machine: Machine


class Layer(Part):
    """One replaced layer."""

    name: str
    site: str
    block: int | None = Field(description="null: outside the blocks")
    out_features: int
    in_features: int
    method: str
    spec: dict[str, Any] = Field(description="how it is stored: representation and its settings")
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    figures: dict[str, Any] = Field(description="what the method found: loss, relative_error, damping, notes, …")


class StepOfStage(Part):
    step: int
    method: str
    layers: int


class StepOfRewriting(Part):
    step: int
    method: str
    note: str = Field(description="what was done")
    figures: dict[str, Any] = Field(description="what was found by looking at the model first")


class Tuning(Part):
    """The step that tuned the finished model."""

    step: int
    method: str
    iterations: int
    figures: dict[str, float] = Field(
        description="divergence from the original on rows set aside, before and after; kept: 1 if the tuned values are stored"
    )


class Base(Part):
    """What may be said of the original in public."""

    id: str | None
    title: str | None
    commit: str | None


class StackLevel(Part):
    """What a level of a stack adds."""

    level: int
    layers: int = Field(description="that have this level")
    bytes: int = Field(description="that it adds")
    bits_per_weight: float = Field(description="of the stacked layers, this level and those before it counted")


class Stack(Part):
    """The sizes that a result can be loaded at."""

    minimum: int = Field(description="bytes of all tensors with every layer at its first level")
    maximum: int = Field(description="bytes of all tensors")
    levels: list[StackLevel]


class RunReport(Frame):
    """`compress_report.json`, the report of `compress run`."""

    kind: Literal["run"]
    work: dict[str, str] = Field(description="what identifies the run: recipe, model, weights, versions")
    out: Path
    model: str = Field(description="as the recipe names it")
    base: Base
    family: str
    n_blocks: int
    rewrites: list[StepOfRewriting] = Field([], description="steps that rewrote the whole model first")
    stages: list[list[StepOfStage]]
    tuning: Tuning | None = Field(None, description="of a result that was tuned as a whole")
    format: str
    format_reason: str
    symmetric: bool
    float_dtype: str
    bytes_before: int = Field(description="replaced layers, in the original")
    bytes_after: int = Field(description="replaced layers, in the result")
    bits_per_weight: float = Field(description="of the replaced layers, everything that they store counted")
    bytes_total_before: int = Field(description="all tensors of the original")
    bytes_total_after: int = Field(description="all tensors of the result")
    stack: Stack | None = Field(None, description="of a result that loads at any size")
    predicted_peak_bytes: int
    predicted_seconds: float
    warnings: list[str]
    layers: list[Layer]
    recipe: dict[str, Any] = Field(description="the recipe, every default written out")
    files: dict[str, int] = Field(description="bytes of each file of the result")
    bytes_on_disk_weights: int
    bytes_on_disk_all: int
    bytes_on_disk_source: int | None
    size: Size
    seconds: dict[str, float] = Field(description="wall time by phase")
    activities: dict[str, float] = Field(description="wall time of the phase compress, by activity")
    peak_bytes: int = Field(description="most anonymous memory of the run")
    peaks: dict[str, int] = Field(description="the same by phase")
    replayed_blocks: int = Field(description="blocks that an interrupted run had finished")
    calibration_tokens: int
    evaluation: Measured = Field(description="empty where the recipe asks for none")


class EvaluationReport(Frame, Measured):
    """What `compress eval --json` prints without --tasks, and `compress.evaluate` returns."""

    kind: Literal["evaluation"]
    size: Size


class Report(RootModel[RunReport | EvaluationReport]):
    """A report: of a run, or of an evaluation."""


def json_schema() -> dict[str, Any]:
    """The JSON schema, 2020-12."""
    made = Report.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Reports of compress-llm", **made}
