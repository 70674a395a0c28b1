"""What a run will do, before it does anything: stages, layers, bytes, format, memory, time. No weights are read.

Everything that can be refused is refused here. The run holds itself to the plan: the bytes of every replaced module must
come out as predicted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from compress.checkpoint.description import modules_of
from compress.checkpoint.foreign import translated
from compress.checkpoint.source import Source, find_source
from compress.errors import CheckpointError, naming
from compress.models.architecture import Architecture, Site
from compress.models.families import architecture_of
from compress.modules.spec import ModuleSpec
from compress.pipeline.folding import takes_scale
from compress.pipeline.plan_checks import check_data_at_hand, check_source
from compress.pipeline.plan_result import LayerPlan, all_warnings, choose_format, described, layer_bits, result_bytes
from compress.pipeline.rewriting import RewritePlan, plan_rewrites
from compress.pipeline.steps import Decisions, StepPlan, foresee, methods_of, plan_steps
from compress.pipeline.tuning_plan import TuningPlan, check_tuning, plan_tuning

if TYPE_CHECKING:
    from compress.methods.base import LayerShape
    from compress.recipe import Recipe

FLOAT_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


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
    tuning: TuningPlan | None = None

    @property
    def staged(self) -> bool:
        """Whether the pass's files are not yet those of the result."""
        return bool(self.stacked) or self.tuning is not None

    @property
    def needs_data(self) -> bool:
        steps = [step for stage in self.stages for step in stage]
        behind = self.tuning is not None
        return behind or any(step.needs_data for step in self.rewrites) or any(step.needs_data for step in steps)

    @property
    def bytes_kept(self) -> int:
        """Of what looking at the model leaves in the output folder until the run is finished."""
        return sum(step.kept_bytes for step in self.rewrites)

    @property
    def specs(self) -> dict[str, ModuleSpec]:
        """Every module of the result that is not an ordinary layer, by disk name."""
        return described(self.source_specs, self.layers)

    @property
    def stacked(self) -> dict[str, ModuleSpec]:
        """The layers whose levels behind the first are written as a stack."""
        found: dict[str, ModuleSpec] = {}
        for step in (step for stage in self.stages for step in stage):
            for name, spec in step.specs.items():
                found.pop(name, None)
                if step.method.stacks and spec.n_levels > 1:
                    found[name] = spec
        return found

    @property
    def stack_levels(self) -> list[dict[str, int]]:
        """What each level of the stacked layers adds: in how many of them, how many bytes. The first is not optional."""
        specs = self.stacked.values()
        levels = []
        for level in range(max((spec.n_levels for spec in specs), default=0)):
            sizes = [spec.level_bytes(level, self.float_dtype) for spec in specs if spec.n_levels > level]
            levels.append({"level": level + 1, "layers": len(sizes), "bytes": sum(sizes)})
        return levels

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
            "tuning": None
            if self.tuning is None
            else {"step": self.tuning.number, "method": self.tuning.method.name, "iterations": self.tuning.iterations},
            "format": self.format,
            "format_reason": self.format_reason,
            "symmetric": all(getattr(spec, "symmetric", True) for spec in self.specs.values()),
            "float_dtype": self.float_dtype,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bits_per_weight": self.bits_per_weight,
            "bytes_total_before": self.bytes_total_before,
            "bytes_total_after": self.bytes_total_after,
            "stack": self._stack(),
            "predicted_peak_bytes": self.peak_bytes,
            "predicted_seconds": self.seconds,
            "warnings": list(self.warnings),
            "layers": [
                {**asdict(layer), "spec": layer.spec.to_dict(), "bits_per_weight": layer_bits(layer)}
                for layer in self.layers.values()
            ],
        }

    def _stack(self) -> dict[str, Any] | None:
        """`minimum`: bytes of the smallest model, every layer at its first level."""
        levels = self.stack_levels
        if not levels:
            return None
        minimum = self.bytes_total_after - sum(level["bytes"] for level in levels[1:])
        weights = sum(spec.in_features * spec.out_features for spec in self.stacked.values())
        bits = [8 * sum(level["bytes"] for level in levels[:n]) / weights for n in range(1, len(levels) + 1)]
        return {
            "minimum": minimum,
            "maximum": self.bytes_total_after,
            "levels": [{**level, "bits_per_weight": so_far} for level, so_far in zip(levels, bits, strict=True)],
        }


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
    tuning = plan_tuning(recipe)
    at_layers = recipe.steps[: tuning.number] if tuning else recipe.steps
    steps = plan_steps(at_layers, weights, source_specs, decisions, first=len(rewrites))
    foresee(steps, weights, source_specs, float_dtype)
    layers = _plan_layers(steps, architecture, weights, source, source_specs, float_dtype)
    specs = described(source_specs, layers)
    format_, reason = choose_format(recipe.output.format, specs, architecture)
    untied = architecture.tied and any(
        n in layers for n in (architecture.head.linears[0], architecture.embedding.linears[0])
    )
    total_before = sum(info.nbytes for info in original.infos.values())
    total_after = result_bytes(source, architecture, source_specs, layers, FLOAT_DTYPES.get(recipe.model.dtype), untied)
    warnings = all_warnings(layers, format_, untied, rewrites, steps, architecture)
    needs_data = any(step.needs_data for step in rewrites) or any(step.needs_data for step in steps)
    needs_data = needs_data or tuning is not None
    check_data_at_hand(recipe, original, architecture, needs_data)
    draft = Plan(
        recipe, original, rewrites, source, architecture, (steps,), layers, source_specs, float_dtype, format_, reason, untied,
        total_before, total_after, 0, 0.0, warnings, tuning,
    )  # fmt: skip
    check_tuning(tuning, source_specs, specs, bool(draft.stacked))
    peak, seconds = estimate(draft)
    return Plan(**{**draft.__dict__, "peak_bytes": peak, "seconds": seconds})


def _specs_of(source: Source) -> dict[str, ModuleSpec]:
    return modules_of(source.config, source.infos)


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
            folds = takes_scale(site, architecture, source.infos)
            weights[name] = (
                site, LayerShape(name, out_features, in_features, site.layer_kind, bias, site.role(name), folds=folds)
            )  # fmt: skip
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
