"""The steps of a recipe, layer by layer: which method does what to which layer, and what the layer is after it.

A step works on what the steps before it left: on the weight of a layer, or on the leaves of a module that an earlier step
made of it (the two factors of a low-rank layer), each of them like a layer of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import lcm
from typing import TYPE_CHECKING

from compress.errors import RecipeError, naming
from compress.models.architecture import Site
from compress.modules.spec import DTYPE_BYTES, ModuleSpec
from compress.patterns import select
from compress.pipeline.folding import folding_layers

if TYPE_CHECKING:
    from torch import Tensor

    from compress.methods.base import Kept, LayerShape, MethodConfig, SiteMethod, Sizes
    from compress.recipe import Step

Decisions = dict[
    int, "dict[str, MethodConfig | Kept]"
]  # of steps, by number: settled configurations (SiteMethod.observe)
Weights = Mapping[str, "tuple[Site, LayerShape]"]  # every layer on disk: its site and shape


@dataclass(frozen=True)
class StepPlan:
    """One step: its method, the configuration of each layer it applies to, and what each is stored as behind it.

    `kept`: layers that were asked for and that the method leaves as they are, with the reason. `starts`: another step learns
    on from what this one makes of `starts`(name, weight), in place of the weight of a layer. `folds`: layers the scale of
    whose inputs goes into what makes these.
    """

    number: int
    method: type[SiteMethod]
    configs: dict[str, MethodConfig]
    specs: dict[str, ModuleSpec]
    needs_data: bool
    needs_original: bool
    kept: dict[str, str] = field(default_factory=dict)
    starts: Callable[[str, Tensor], Tensor] | None = None
    folds: frozenset[str] = frozenset()


def plan_steps(
    steps: Sequence[Step],
    weights: Weights,
    source_specs: Mapping[str, ModuleSpec],
    decisions: Decisions | None = None,
    first: int = 0,
) -> tuple[StepPlan, ...]:
    """What every step from number `first` on does; `decisions` stand in place of the recipe's configurations.

    Raises: RecipeError naming the step, the layer, the reason and a value that works.
    """
    chosen = [_chosen(first + i, step, weights) for i, step in enumerate(steps[first:])]
    current = dict(source_specs)
    planned: list[StepPlan] = []
    for number, (method, configs) in enumerate(chosen, start=first):
        later = chosen[number - first + 1 :]
        fitted: dict[str, MethodConfig | Kept] = {
            name: method.fitted(config, _multiple(name, later)) for name, config in configs.items()
        }
        fitted |= (decisions or {}).get(number, {})
        fitted |= _arranged(_where(number, method), method, fitted, weights)
        planned.append(_plan_step(number, method, fitted, weights, current))
        _check_window(planned)
        current.update(planned[-1].specs)
    return _lending(planned, current, source_specs)


def _arranged(
    where: str, method: type[SiteMethod], choices: Mapping[str, MethodConfig | Kept], weights: Weights
) -> dict[str, MethodConfig]:
    from compress.methods.base import Kept

    configs = {name: choice for name, choice in choices.items() if not isinstance(choice, Kept)}
    with naming(where):
        return method.arranged({name: weights[name][1] for name in configs}, configs)


def _lending(
    planned: Sequence[StepPlan], final: Mapping[str, ModuleSpec], source_specs: Mapping[str, ModuleSpec]
) -> tuple[StepPlan, ...]:
    """`planned`, modules that borrow with what they borrow as it is in the end: their lenders are finished before them.

    Raises: RecipeError if a module stays as it was and what it borrows does not.
    """
    touched = {name for step in planned for name in step.specs}
    for name, spec in source_specs.items():
        lender = spec.lender()
        if lender in touched and name not in touched:
            step = next(step for step in planned if lender in step.specs)
            raise RecipeError(
                f"{_where(step.number, step.method)}: {name} uses the dictionary that {lender} stores, which this step changes; "
                f"name both, or skip both"
            )

    def settled(spec: ModuleSpec) -> ModuleSpec:
        lender = spec.lender()
        return spec if lender is None else spec.borrowing(final[lender])

    return tuple(replace(s, specs={name: settled(spec) for name, spec in s.specs.items()}) for s in planned)


def sizes(
    steps: Sequence[StepPlan],
    number: int,
    shapes: Mapping[str, LayerShape],
    source_specs: Mapping[str, ModuleSpec],
    float_dtype: str,
) -> Sizes:
    """What layers take in the result, for what step `number` may store them as."""
    from compress.methods.base import Kept

    before = dict(source_specs)
    for step in steps[:number]:
        before.update(step.specs)

    def nbytes(name: str, spec: ModuleSpec | None) -> int:
        current, shape = spec or before.get(name), shapes[name]
        for step in steps[number + 1 :]:
            if name in step.configs:
                found = _spec_after(_where(step.number, step.method), step.method, step.configs[name], shape, current)
                current = current if isinstance(found, Kept) else found
        dense = DTYPE_BYTES[float_dtype] * shape.out_features * shape.in_features
        return dense if current is None else current.nbytes(float_dtype)

    return nbytes


def foresee(
    steps: Sequence[StepPlan], weights: Weights, source_specs: Mapping[str, ModuleSpec], float_dtype: str
) -> None:
    """Lets methods refuse what they could not settle later. Raises: RecipeError naming the step."""
    shapes = {name: shape for name, (_, shape) in weights.items()}
    for step in steps:
        configs = {name: config for name, config in step.configs.items() if step.method.observes(config)}
        if configs:
            with naming(_where(step.number, step.method)):
                nbytes = sizes(steps, step.number, shapes, source_specs, float_dtype)
                step.method.foresee({name: shapes[name] for name in configs}, configs, nbytes)


def leaf_name(name: str, leaf: str) -> str:
    """How a leaf of layer `name` is called in messages, reports and on disk."""
    return f"{name}.{leaf}" if leaf else name


def methods_of(name: str, steps: Sequence[StepPlan]) -> str:
    """The methods that worked on a layer, in order: "svd+gptq"."""
    return "+".join(step.method.name for step in steps if name in step.configs)


def _chosen(number: int, step: Step, weights: Weights) -> tuple[type[SiteMethod], dict[str, MethodConfig]]:
    from compress.methods import find
    from compress.methods.base import SiteMethod

    where = f"steps.{number}"
    method = find(step.method)
    assert issubclass(method, SiteMethod)
    outside = [name for name, (site, _) in weights.items() if site.kind in ("head", "embedding")]
    names = select(list(weights), step.layers, step.skip, outside=outside, where=where)
    if not names:
        raise RecipeError(f"{where}: {step.method}: layers minus skip leave no layer; widen layers or narrow skip")
    return method, step.configs(names, where=where)


def _multiple(name: str, later: Sequence[tuple[type[SiteMethod], Mapping[str, MethodConfig]]]) -> int:
    """What the inputs of the leaves of `name` must be a multiple of for the steps that come later."""
    return lcm(*(method.in_multiple(configs[name]) for method, configs in later if name in configs))


def _plan_step(
    number: int,
    method: type[SiteMethod],
    choices: Mapping[str, MethodConfig | Kept],
    weights: Weights,
    current: Mapping[str, ModuleSpec],
) -> StepPlan:
    from compress.methods.base import Kept

    where = _where(number, method)
    kept = {name: choice.reason for name, choice in choices.items() if isinstance(choice, Kept)}
    configs = {name: choice for name, choice in choices.items() if not isinstance(choice, Kept)}
    requests = {request for config in configs.values() for request in method.statistics(config)}
    needs_original = any(request.needs_original for request in requests)
    specs: dict[str, ModuleSpec] = {}
    folds = folding_layers(method, configs, weights, current)
    for name, config in configs.items():
        site, shape = weights[name]
        shape = replace(shape, folds=name in folds)
        if needs_original and site.expert is not None:
            raise RecipeError(
                f"{where}: {name}: compares with the original model's inputs, but routers send other tokens to an expert "
                f"there; skip the experts or turn the comparison off"
            )
        found = _spec_after(where, method, config, shape, current.get(name))
        if isinstance(found, Kept):
            kept[name] = found.reason
        else:
            assert (found.out_features, found.in_features) == (shape.out_features, shape.in_features)
            specs[name] = found
    if not specs:
        name, reason = next(iter(kept.items()))
        raise RecipeError(f"{where}: no layer would change; {name}: {reason}")
    used = {name: config for name, config in configs.items() if name in specs}
    if method.by_blocks:
        with naming(where):
            method.window(used)  # type: ignore[attr-defined]
    if method.stacks:
        with naming(where):
            method.order_rows(used)  # refuses settings that must be those of all layers
    needs_data = any(method.needs_tokens(config) for config in used.values())
    return StepPlan(number, method, used, specs, needs_data, needs_original, kept, folds=folds)


def _check_window(planned: Sequence[StepPlan]) -> None:
    """A window's later blocks are learned before the steps in front get to them: they must leave its layers alone."""
    *earlier, step = planned
    if not step.method.by_blocks or step.method.window(step.configs) == 1:  # type: ignore[attr-defined]
        return
    for before in earlier:
        for name in step.specs:
            if name in before.specs:
                raise RecipeError(
                    f"{_where(step.number, step.method)}: {name} is changed by {_where(before.number, before.method)} first, "
                    f"and a window learns blocks that step has not reached; use window: 1 and overlap: 0, or skip the layer "
                    f"in one of them"
                )


def _where(number: int, method: type[SiteMethod]) -> str:
    return f"steps.{number}.{method.name}"


def _spec_after(
    where: str, method: type[SiteMethod], config: MethodConfig, shape: LayerShape, before: ModuleSpec | None
) -> ModuleSpec | Kept:
    """The spec of a layer behind a step, or why it is kept."""
    from compress.methods.base import Kept, LayerShape

    if before is None:
        return method.plan(shape, config)
    leaves, masked = before.leaf_shapes(), before.masked_leaves()
    if masked and not method.keeps_masks:
        raise RecipeError(
            f"{where}: {leaf_name(shape.name, min(masked))} is pruned by then, and {method.name} would fill its zeros; put it "
            f"before the step that prunes, or skip the layer"
        )
    if set(leaves) == {""}:
        whole = method.plan(replace(shape, masked="" in masked), config)
        return whole if isinstance(whole, Kept) else before.with_leaf("", whole)
    if not method.on_leaves:
        raise RecipeError(
            f"{where}: {shape.name} is stored as {before.representation} by then, and {method.name} works on whole weights; "
            f"put it before that step, or skip the layer"
        )
    unknown = [type(request).__name__ for request in method.statistics(config) if not request.linear]
    if unknown:
        raise RecipeError(
            f"{where}: needs {unknown[0]} of a layer's inputs, which cannot be had inside {shape.name}, stored as "
            f"{before.representation} by then; skip the layer, or use a method that needs second moments only"
        )
    spec = before
    for leaf, (out_features, in_features) in leaves.items():
        part = LayerShape(leaf_name(shape.name, leaf), out_features, in_features, masked=leaf in masked)
        found = method.plan(part, config)
        if isinstance(found, Kept):
            continue
        spec = spec.with_leaf(leaf, found)
    return spec if spec is not before else Kept(f"{method.name} keeps each of its leaves")
