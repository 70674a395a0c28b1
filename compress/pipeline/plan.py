"""What a run will do, before it does anything: stages, layers, bytes, format, memory, time. No weights are read.

Everything that can be refused is refused here. The run holds itself to the plan: the bytes of every replaced module must
come out as predicted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

from compress.checkpoint.description import modules_of, standard_holds
from compress.checkpoint.foreign import translated
from compress.checkpoint.headers import TensorInfo
from compress.checkpoint.names import compact, owner
from compress.checkpoint.source import Source, find_source, tokenizer_size
from compress.errors import CheckpointError, RecipeError, naming
from compress.models.architecture import Architecture, Site
from compress.models.families import architecture_of
from compress.modules.spec import DTYPE_BYTES, ModuleSpec
from compress.pipeline.rewriting import RewritePlan, plan_rewrites
from compress.pipeline.steps import Decisions, StepPlan, foresee, methods_of, plan_steps

if TYPE_CHECKING:
    from compress.methods.base import LayerShape
    from compress.recipe import Recipe

STANDARD, OWN, PLAIN = "compressed-tensors", "compress", "plain"
FLOAT_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


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


@dataclass(frozen=True)
class Plan:
    """The whole run. `stages` are runs of consecutive steps that share one pass over the blocks.

    `source` is the model as the first stage reads it: the `original`, or what `rewrites` make of it.
    """

    recipe: Recipe
    original: Source
    rewrites: tuple[RewritePlan, ...]
    source: Source
    architecture: Architecture
    stages: tuple[tuple[StepPlan, ...], ...]
    layers: dict[str, LayerPlan]
    source_specs: dict[str, ModuleSpec]  # modules of the source that are compressed already
    float_dtype: str  # safetensors name of the dtype in which float tensors will be stored
    format: str
    format_reason: str
    untied: bool
    bytes_total_before: int
    bytes_total_after: int
    peak_bytes: int
    seconds: float
    warnings: tuple[str, ...] = field(default=())

    @property
    def needs_data(self) -> bool:
        steps = [step for stage in self.stages for step in stage]
        return any(step.needs_data for step in self.rewrites) or any(step.needs_data for step in steps)

    @property
    def specs(self) -> dict[str, ModuleSpec]:
        """Every module of the result that is not an ordinary layer, by disk name."""
        return described(self.source_specs, self.layers)

    @property
    def bytes_before(self) -> int:
        return sum(layer.bytes_before for layer in self.layers.values())

    @property
    def bytes_after(self) -> int:
        return sum(layer.bytes_after for layer in self.layers.values())

    @property
    def n_weights(self) -> int:
        return sum(layer.out_features * layer.in_features for layer in self.layers.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes_after / max(self.n_weights, 1)

    def to_dict(self) -> dict[str, Any]:
        """For `--json` and the report."""
        return {
            "model": self.source.name,
            "base": self.source.published,
            "family": self.architecture.family,
            "n_blocks": self.architecture.n_blocks,
            "rewrites": [
                {"step": r.number, "method": r.method.name, "note": r.rewrite.note, "figures": dict(r.values or {})}
                for r in self.rewrites
            ],
            "stages": [
                [{"step": s.number, "method": s.method.name, "layers": len(s.configs)} for s in stage]
                for stage in self.stages
            ],
            "format": self.format,
            "format_reason": self.format_reason,
            "symmetric": all(getattr(spec, "symmetric", True) for spec in self.specs.values()),
            "float_dtype": self.float_dtype,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bits_per_weight": self.bits_per_weight,
            "bytes_total_before": self.bytes_total_before,
            "bytes_total_after": self.bytes_total_after,
            "predicted_peak_bytes": self.peak_bytes,
            "predicted_seconds": self.seconds,
            "warnings": list(self.warnings),
            "layers": [
                {**asdict(layer), "spec": layer.spec.to_dict(), "bits_per_weight": layer_bits(layer)}
                for layer in self.layers.values()
            ],
        }


def layer_bits(layer: LayerPlan) -> float:
    return 8 * layer.bytes_after / (layer.out_features * layer.in_features)


def plan(recipe: Recipe) -> Plan:
    """Work out what `recipe` will do.

    Raises: RecipeError or CheckpointError, one line naming the thing and the remedy, for everything that can be known now.
    """
    return plan_source(recipe, find_source(recipe.model.path, recipe.model.revision))


def plan_source(
    recipe: Recipe,
    original: Source,
    decisions: Decisions | None = None,
    rewrites: tuple[RewritePlan, ...] | None = None,
) -> Plan:
    """`plan` for a source that was found.

    Args:
        decisions: of methods that looked at the model, in place of the recipe's configurations.
        rewrites: the steps that rewrite the model, with what they found by looking at it.
    """
    from compress.pipeline.estimate import estimate

    with naming(original.name):
        original = replace(original, infos=translated(original.config, original.infos))
        check_source(original, architecture_of(original.config, original.infos.keys()), _specs_of(original))
    float_dtype = FLOAT_DTYPES.get(recipe.model.dtype) or stored_float_dtype(original)
    if rewrites is None:
        rewrites = plan_rewrites(recipe, original, float_dtype)
    source = rewrites[-1].after if rewrites else original
    with naming(source.name):
        architecture = architecture_of(source.config, source.infos.keys())
        source_specs = modules_of(source.config, source.infos)
    weights = _weights(source, architecture, source_specs)
    steps = plan_steps(recipe.steps, weights, source_specs, decisions, first=len(rewrites))
    foresee(steps, weights, source_specs, float_dtype)
    layers = _plan_layers(steps, architecture, weights, source, source_specs, float_dtype)
    specs = described(source_specs, layers)
    format_, reason = _choose_format(recipe.output.format, specs, architecture)
    untied = architecture.tied and any(
        n in layers for n in (architecture.head.linears[0], architecture.embedding.linears[0])
    )
    total_before = sum(info.nbytes for info in original.infos.values())
    total_after = _bytes_after(source, architecture, source_specs, layers, FLOAT_DTYPES.get(recipe.model.dtype), untied)
    warnings = [*_warnings(layers, format_, untied), *_kept(steps), *_unsettled(rewrites, steps)]
    warnings += [f"steps.{r.number}.{r.method.name}: {warning}" for r in rewrites for warning in r.rewrite.warnings]
    untied_by = [step for step in rewrites if step.rewrite.untied]
    if untied_by:
        warnings.append(_untied_by(untied_by[0], architecture))
    needs_data = any(step.needs_data for step in rewrites) or any(step.needs_data for step in steps)
    _check_data(recipe, original, architecture, needs_data)
    draft = Plan(
        recipe, original, rewrites, source, architecture, (steps,), layers, source_specs, float_dtype, format_, reason, untied,
        total_before, total_after, 0, 0.0, tuple(warnings),
    )  # fmt: skip
    peak, seconds = estimate(draft)
    return Plan(**{**draft.__dict__, "peak_bytes": peak, "seconds": seconds})


def _specs_of(source: Source) -> dict[str, ModuleSpec]:
    return modules_of(source.config, source.infos)


def check_source(source: Source, architecture: Architecture, specs: dict[str, ModuleSpec]) -> None:
    """Every tensor that the architecture names is there, in the shape that config.json implies.

    Raises: CheckpointError naming the first one that is not.
    """
    for site in architecture.all_sites():
        for name in site.linears:
            if name in specs:
                for suffix, (_, shape) in specs[name].tensors("F32").items():
                    _check_tensor(source, f"{name}.{suffix}", shape)
            elif not (site.kind == "head" and architecture.tied):
                _check_tensor(source, f"{name}.weight", None)

    table = f"{architecture.embedding.linears[0]}.weight"
    if table in source.infos and source.infos[table].shape[:1] != (architecture.vocab_size,):
        raise CheckpointError(
            f"{source.folder or source.name}: tensor {table} has shape {source.infos[table].shape}, config.json has "
            f"vocab_size={architecture.vocab_size}; the weights do not belong to this config.json: fetch both again"
        )


def _check_tensor(source: Source, name: str, shape: tuple[int, ...] | None) -> None:
    info = source.infos.get(name)
    where = source.folder or source.name
    if info is None:
        raise CheckpointError(
            f"{where}: tensor {name} is missing; the weights do not belong to this config.json: fetch both again"
        )
    if shape is not None and info.shape != shape:
        raise CheckpointError(
            f"{where}: tensor {name} has shape {info.shape}, config.json describes {shape}; fetch both again"
        )


def stored_float_dtype(source: Source) -> str:
    """The dtype that most float bytes of the source are stored in."""
    sizes: dict[str, int] = {}
    for info in source.infos.values():
        if info.dtype in ("F64", "F32", "F16", "BF16"):
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    return max(sizes, key=lambda name: sizes[name]) if sizes else "F32"


def _weights(
    source: Source, architecture: Architecture, specs: dict[str, ModuleSpec]
) -> dict[str, tuple[Site, LayerShape]]:
    """Site and shape [out, in] of every linear, the head and the token table."""
    from compress.methods.base import LayerShape

    weights = {}
    for site in architecture.all_sites():
        for name in site.linears:
            bias = f"{name}.bias" in source.infos
            if name in specs:
                out_features, in_features = specs[name].out_features, specs[name].in_features
            else:
                tied = site.kind == "head" and architecture.tied
                shape = source.infos[f"{architecture.embedding.linears[0] if tied else name}.weight"].shape
                if len(shape) != 2:
                    raise CheckpointError(
                        f"{source.name}: tensor {name}.weight has shape {shape}; a matrix is expected"
                    )
                flipped = architecture.transposed and site.kind not in ("head", "embedding")
                out_features, in_features = reversed(shape) if flipped else shape
            weights[name] = (site, LayerShape(name, out_features, in_features, site.layer_kind, bias, site.role(name)))
    return weights


def _plan_layers(
    steps: tuple[StepPlan, ...],
    architecture: Architecture,
    weights: dict[str, tuple[Site, LayerShape]],
    source: Source,
    source_specs: dict[str, ModuleSpec],
    float_dtype: str,
) -> dict[str, LayerPlan]:
    last = {name: step for step in steps for name in step.configs}
    block_of = {site.name: i for i in range(architecture.n_blocks) for site in architecture.sites(i)}
    layers = {}
    for name, (site, shape) in weights.items():
        if name not in last:
            continue
        spec = last[name].specs[name]
        if name in source_specs:
            before = sum(source.infos[f"{name}.{suffix}"].nbytes for suffix in source_specs[name].tensors("F32"))
        elif site.kind == "head" and architecture.tied:
            before = 0  # its weight is the token table's, counted there
        else:
            before = source.infos[f"{name}.weight"].nbytes
        layers[name] = LayerPlan(
            name, site.name, block_of.get(site.name), shape.out_features, shape.in_features, methods_of(name, steps), spec,
            before, spec.nbytes(float_dtype),
        )  # fmt: skip
    return layers


def described(source_specs: Mapping[str, ModuleSpec], layers: Mapping[str, LayerPlan]) -> dict[str, ModuleSpec]:
    """The modules of a result that `config.json` must describe."""
    specs = {**source_specs, **{name: layer.spec for name, layer in layers.items()}}
    return {name: spec for name, spec in specs.items() if not spec.plain}


def _choose_format(wanted: str, specs: dict[str, ModuleSpec], architecture: Architecture) -> tuple[str, str]:
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


def _bytes_after(
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
    warnings += [
        f"{layer.name}: {layer.bytes_after:,} bytes after, {layer.bytes_before:,} before: no gain"
        for layer in layers.values()
        if layer.bytes_after >= layer.bytes_before > 0 and not layer.spec.plain
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


def _check_data(recipe: Recipe, source: Source, architecture: Architecture, needs_data: bool) -> None:
    """Tokenizer and data are at hand where a step (`needs_data`) or the evaluation needs them."""
    from compress.calibration.data import check_data

    if (needs_data or recipe.evaluation) and not source.has_tokenizer:
        raise CheckpointError(
            f"{source.name}: no tokenizer (tokenizer.json or tokenizer.model) beside the weights, which calibration and "
            f"evaluation need; copy the tokenizer's files into the folder"
        )
    size = tokenizer_size(source)
    if (needs_data or recipe.evaluation) and size is not None and size > architecture.vocab_size:
        raise CheckpointError(
            f"{source.name}: the tokenizer has ids up to {size - 1}, the model only {architecture.vocab_size} rows of "
            f"embeddings: it is another model's tokenizer; put the right one beside the weights"
        )
    if needs_data:
        _check_length("calibration.length", recipe.calibration.length, architecture)
        check_data(recipe.calibration, "calibration")
    if recipe.evaluation:
        if recipe.evaluation.length is not None:
            _check_length("evaluation.length", recipe.evaluation.length, architecture)
        check_data(recipe.evaluation, "evaluation")


def _check_length(field_name: str, length: int, architecture: Architecture) -> None:
    if architecture.max_positions is not None and length > architecture.max_positions:
        raise RecipeError(
            f"{field_name}: {length} tokens, but the model has {architecture.max_positions} positions; "
            f"use --set {field_name}={architecture.max_positions}"
        )
