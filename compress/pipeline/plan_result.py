"""What a plan says of the result: which layers become what, in which format, how many bytes, and what to be told of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from compress.checkpoint.description import standard_holds
from compress.checkpoint.headers import TensorInfo
from compress.checkpoint.names import compact, owner
from compress.checkpoint.source import Source
from compress.errors import RecipeError
from compress.models.architecture import Architecture
from compress.modules.spec import DTYPE_BYTES, ModuleSpec

if TYPE_CHECKING:
    from compress.pipeline.rewriting import RewritePlan
    from compress.pipeline.steps import StepPlan

STANDARD, OWN, PLAIN = "compressed-tensors", "compress", "plain"


@dataclass(frozen=True)
class LayerPlan:
    """One layer that will be replaced. `method` and `spec` are those of the last step that touches it."""

    name: str
    site: str
    block: int | None  # None: the head or the token table
    out_features: int
    in_features: int
    method: str
    spec: ModuleSpec
    bytes_before: int
    bytes_after: int


def layer_bits(layer: LayerPlan) -> float:
    return 8 * layer.bytes_after / (layer.out_features * layer.in_features)


def described(source_specs: Mapping[str, ModuleSpec], layers: Mapping[str, LayerPlan]) -> dict[str, ModuleSpec]:
    """The modules of a result that `config.json` must describe."""
    specs = {**source_specs, **{name: layer.spec for name, layer in layers.items()}}
    return {name: spec for name, spec in specs.items() if not spec.plain}


def choose_format(wanted: str, specs: dict[str, ModuleSpec], architecture: Architecture) -> tuple[str, str]:
    if not specs and architecture.structure.plain:
        if wanted != "auto":
            raise RecipeError(
                f"output.format: every layer of this result is an ordinary one, and {wanted} would have nothing to describe; "
                f"use output.format=auto"
            )
        return PLAIN, "weights have changed, but every layer is an ordinary one: any tool loads it"
    plain = architecture.structure.plain
    obstacle = standard_holds(specs, architecture) if plain else architecture.structure.reason
    if wanted == STANDARD and obstacle is not None:
        raise RecipeError(
            f"output.format: compressed-tensors cannot hold this result: {obstacle}; use output.format=auto"
        )
    if wanted == OWN:
        return OWN, "asked for by output.format"
    if obstacle is not None:
        return OWN, obstacle
    return STANDARD, "every replaced module is an integer-quantized linear that compressed-tensors holds"


def result_bytes(
    source: Source,
    architecture: Architecture,
    source_specs: dict[str, ModuleSpec],
    layers: dict[str, LayerPlan],
    cast: str | None,
    untied: bool,
) -> int:
    """Bytes of all tensors of the result."""
    kept = sum(
        stored_bytes(info, cast)
        for name, info in source.infos.items()
        if owner(name, layers) is None or name.endswith(".bias")
    )
    total = kept + sum(layer.bytes_after for layer in layers.values())
    head, table = architecture.head.linears[0], architecture.embedding.linears[0]
    if untied and not (head in layers and table in layers):
        total += stored_bytes(source.infos[f"{table}.weight"], cast) if head not in layers or table in layers else 0
    return total


def stored_bytes(info: TensorInfo, cast: str | None) -> int:
    """Bytes of a tensor that is kept, floats in the dtype `cast`; None: each in its own."""
    is_float = info.dtype in ("F64", "F32", "F16", "BF16")
    return prod(info.shape) * DTYPE_BYTES[cast if cast is not None and is_float else info.dtype]


def all_warnings(
    layers: dict[str, LayerPlan],
    format_: str,
    untied: bool,
    rewrites: tuple[RewritePlan, ...],
    steps: tuple[StepPlan, ...],
    architecture: Architecture,
) -> tuple[str, ...]:
    """A line for each thing that whoever wrote the recipe may not expect."""
    warnings = [*_warnings(layers, format_, untied), *_kept(steps), *_unsettled(rewrites, steps)]
    warnings += [f"steps.{r.number}.{r.method.name}: {warning}" for r in rewrites for warning in r.rewrite.warnings]
    untied_by = [step for step in rewrites if step.rewrite.untied]
    if untied_by:
        warnings.append(_untied_by(untied_by[0], architecture))
    return tuple(warnings)


def _warnings(layers: dict[str, LayerPlan], format_: str, untied: bool) -> list[str]:
    warnings = []
    if untied:
        warnings.append(
            "the head and the token table share one matrix in the source; they are stored apart, which adds bytes"
        )
    if format_ == STANDARD and any(not getattr(layer.spec, "symmetric", True) for layer in layers.values()):
        warnings.append(
            "asymmetric grids: stock transformers loads the result only with "
            "quantization_config=CompressedTensorsConfig(dequantize=True); compress.load needs nothing"
        )
    lenders = {layer.spec.lender() for layer in layers.values()}  # they store for others too
    warnings += [
        f"{layer.name}: {layer.bytes_after:,} bytes after, {layer.bytes_before:,} before: no gain"
        for layer in layers.values()
        if layer.bytes_after >= layer.bytes_before > 0 and not layer.spec.plain and layer.name not in lenders
    ]
    return warnings


def _untied_by(step: RewritePlan, architecture: Architecture) -> str:
    nbytes = step.after.infos[f"{architecture.head.linears[0]}.weight"].nbytes
    return (
        f"steps.{step.number}.{step.method.name}: the head and the token table share one matrix in the source; they are stored "
        f"apart, which adds {nbytes:,} bytes"
    )


def _unsettled(rewrites: tuple[RewritePlan, ...], steps: tuple[StepPlan, ...]) -> list[str]:
    """A line for each step that decides something from the whole model first."""
    whole = [
        f"steps.{step.number}.{step.method.name} looks at the whole model first; until then it is planned by its sizes"
        for step in rewrites
        if not step.settled
    ]
    counts = [(step, sum(step.method.observes(config) for config in step.configs.values())) for step in steps]
    return whole + [
        f"steps.{step.number}.{step.method.name} settles {count} layers once it has seen the whole model; until then each is "
        f"planned with its share of the total"
        for step, count in counts
        if count
    ]


def _kept(steps: tuple[StepPlan, ...]) -> list[str]:
    """A line for each reason to keep layers, with their names in short."""
    warnings = []
    for step in steps:
        reasons: dict[str, list[str]] = {}
        for name, reason in step.kept.items():
            reasons.setdefault(reason, []).append(name)
        warnings += [
            f"steps.{step.number}.{step.method.name}: {', '.join(compact(names))}: kept as before: {reason}"
            for reason, names in reasons.items()
        ]
    return warnings
