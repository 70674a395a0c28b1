"""Predicted peak memory and time of a run, from shapes alone.

Memory is a sum of what is alive at the worst moment, term by term. Time is arithmetic divided by the speed of a matrix
product measured on the spot, so it is an estimate of the order, not a promise; the report puts both beside what happened.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.description import modules_of
from compress.checkpoint.headers import TensorInfo
from compress.checkpoint.names import owner
from compress.checkpoint.source import SHIPPED
from compress.evaluation.chunks import LOGIT_BYTES, MIN_CHUNK_TOKENS
from compress.models.derived import Derived
from compress.models.families import architecture_of
from compress.modules.spec import DTYPE_BYTES, ModuleSpec
from compress.shipped import heldout_text_path

if TYPE_CHECKING:
    from compress.methods.base import Extent, LayerShape
    from compress.pipeline.plan import Plan
    from compress.pipeline.rewriting import RewritePlan
    from compress.pipeline.steps import StepPlan

BASE_BYTES = 380 * 2**20  # anonymous memory of the process with torch and transformers imported, measured
FRAGMENTATION = 1.25  # what the allocator holds over what is alive, for tensors of activations, measured
COMPUTE_BYTES = 4  # float32
PROBE_TOKENS = 64  # of data-free runs
GEMM_EFFICIENCY = 0.6  # of the measured peak, over shapes and the memory-bound rest
STARTUP_SECONDS = 6.0  # imports, tokenizer, skeleton
BYTES_PER_TOKEN = 4  # of English text, for the size of an evaluation text that is not tokenized yet
UNKNOWN_TEXT_TOKENS = 300_000  # about that of WikiText-2's test split
MAKING_COPIES = 3  # of a tensor in float64 while it is made: before, after, and in between
TUNING_COPIES = 3  # of a block: its codes and weights, the gradient, what is made on the way
TUNING_HELD = 8  # what a pass back through a block keeps, in hidden states and inner ones
LOGIT_COPIES = 5  # both models' logits of a chunk and what is computed from them


def estimate(plan: Plan) -> tuple[int, float]:
    """(peak bytes of anonymous memory, seconds) of the whole run."""
    tokens = _calibration_tokens(plan)
    compress_bytes = _block_bytes(plan) + _activation_bytes(plan, tokens) + _outside_bytes(plan, tokens)
    evaluation_bytes = 0
    if plan.recipe.evaluation:
        evaluation_bytes = _evaluation_bytes(plan)
    looking_bytes = max(_observation_bytes(plan, tokens), _looking_bytes(plan, tokens))
    tuning_bytes = _tuning_bytes(plan, tokens)
    peak = BASE_BYTES + max(compress_bytes + _making_bytes(plan), evaluation_bytes, looking_bytes, tuning_bytes)
    return peak, _seconds(plan, tokens)


def _calibration_tokens(plan: Plan) -> int:
    if not plan.needs_data:
        return PROBE_TOKENS
    return plan.recipe.calibration.samples * plan.recipe.calibration.length


def _block_parameters(plan: Plan) -> list[int]:
    """Stored elements of each block; packed words count as the weights that they hold."""
    return _elements(plan.architecture.blocks, plan.source.infos, plan.source_specs)


def _elements(blocks: Sequence[str], infos: Mapping[str, TensorInfo], specs: Mapping[str, ModuleSpec]) -> list[int]:
    counts = []
    for prefix in blocks:
        inside = prefix + "."
        plain = (info for name, info in infos.items() if name.startswith(inside) and owner(name, specs) is None)
        packed = (spec for name, spec in specs.items() if name.startswith(inside))
        counts.append(sum(prod(i.shape) for i in plain) + sum(s.in_features * s.out_features for s in packed))
    return counts


def _parameters_before(step: RewritePlan) -> list[int]:
    """`_block_parameters` of the model as a rewriting step finds it."""
    config, infos = step.before.config, step.before.infos
    return _elements(architecture_of(config, infos.keys()).blocks, infos, modules_of(config, infos))


def _block_bytes(plan: Plan) -> int:
    """The largest block in float32 (twice where the original runs beside it), and the work on its worst site."""
    copies = max(2 if any(step.needs_original for stage in plan.stages for step in stage) else 1, _window(plan))
    block = max(_block_parameters(plan), default=0) * COMPUTE_BYTES * copies
    packed = max(
        (
            sum(layer.bytes_after for layer in plan.layers.values() if layer.block == index)
            for index in range(plan.architecture.n_blocks)
        ),
        default=0,
    )
    worst = 0
    for step, _, shapes in _site_work(plan):
        config = step.configs[shapes[0].name]
        statistics = sum(r.nbytes(shapes[0].in_features) for r in step.method.statistics(config))
        worst = max(worst, statistics + step.method.workspace(shapes, config))
    return block + packed + max(worst, _learning_bytes(plan))


def _learning_steps(plan: Plan) -> list[StepPlan]:
    """Those that learn the layers of blocks together."""
    return [step for stage in plan.stages for step in stage if step.method.by_blocks]


def _window(plan: Plan) -> int:
    """The most blocks that are learned together; 1 where nothing is learned."""
    return max((step.method.window(step.configs) for step in _learning_steps(plan)), default=1)  # type: ignore[attr-defined]


def _block_shapes(plan: Plan, step: StepPlan, index: int) -> tuple[LayerShape, ...]:
    """The layers of block `index` that a step applies to."""
    from compress.methods.base import LayerShape

    layers = [plan.layers[name] for name in step.configs]
    return tuple(LayerShape(x.name, x.out_features, x.in_features) for x in layers if x.block == index)


def _learning_bytes(plan: Plan) -> int:
    """Of learning the block, or window, with the most weights."""
    peak, length = 0, plan.recipe.calibration.length
    for step in _learning_steps(plan):
        for index in range(plan.architecture.n_blocks):
            shapes = _block_shapes(plan, step, index)
            if shapes:
                config: Any = step.configs[shapes[0].name]
                widest = max(s.in_features for s in shapes)
                peak = max(peak, step.method.learning_bytes(shapes, config, length, widest))  # type: ignore[attr-defined]
    return peak


def _learning_flops(plan: Plan) -> float:
    total, length = 0.0, plan.recipe.calibration.length
    for step in _learning_steps(plan):
        for index in range(plan.architecture.n_blocks):
            shapes = _block_shapes(plan, step, index)
            if shapes:
                config: Any = step.configs[shapes[0].name]
                total += step.method.learning_flops(shapes, config, length)  # type: ignore[attr-defined]
    return total


def _site_work(plan: Plan) -> list[tuple[StepPlan, str, tuple[LayerShape, ...]]]:
    """(step, site name, shapes of its layers) for everything that will be compressed."""
    from compress.methods.base import LayerShape

    work = []
    for stage in plan.stages:
        for step in stage:
            for site in plan.architecture.all_sites():
                shapes = tuple(
                    LayerShape(n, plan.layers[n].out_features, plan.layers[n].in_features)
                    for n in site.linears
                    if n in step.configs
                )
                if shapes:
                    work.append((step, site.name, shapes))
    return work


def _activation_bytes(plan: Plan, tokens: int) -> int:
    """Those that are held, and the working set of the forward that runs."""
    running = min(tokens, plan.recipe.calibration.rows_per_batch * plan.recipe.calibration.length)
    return int(FRAGMENTATION * (_held_bytes(plan, tokens) + running * COMPUTE_BYTES * 4 * _widest(plan)))


def _held_bytes(plan: Plan, tokens: int) -> int:
    """Hidden states of all tokens and what stopped forwards hold."""
    streams = 2 if any(step.needs_original or step.method.by_blocks for stage in plan.stages for step in stage) else 1
    return tokens * COMPUTE_BYTES * (2 * plan.architecture.hidden_size + _widest(plan)) * streams


def _widest(plan: Plan) -> int:
    return max((layer.in_features for layer in plan.layers.values()), default=plan.architecture.hidden_size)


def spilled_bytes(plan: Plan, activation_bytes: int) -> int:
    """Of activations that go to disk, in the output folder, where `activation_bytes` of them may lie in memory."""
    return max(0, _held_bytes(plan, _calibration_tokens(plan)) - activation_bytes)


def _outside_bytes(plan: Plan, tokens: int) -> int:
    """Rows of the token table that occur, and the head for the check of the logits."""
    architecture = plan.architecture
    rows = min(tokens, architecture.vocab_size)
    head_elements = architecture.vocab_size * architecture.hidden_size
    return rows * architecture.hidden_size * COMPUTE_BYTES + head_elements * DTYPE_BYTES[plan.float_dtype]


def _extent(plan: Plan, tokens: int, shapes: tuple[LayerShape, ...]) -> Extent:
    from compress.methods.base import Extent

    architecture, calibration = plan.architecture, plan.recipe.calibration
    n_weights = sum(prod(info.shape) for info in plan.source.infos.values())
    batch_tokens = min(tokens, calibration.rows_per_batch * calibration.length)
    sizes = (n_weights, architecture.n_blocks, architecture.hidden_size, architecture.vocab_size, tokens, batch_tokens)
    return Extent(*sizes, shapes, calibration.samples if plan.needs_data else 1)


def _extent_before(plan: Plan, step: RewritePlan, tokens: int) -> Extent:
    """Of the model as a rewriting step finds it."""
    extent = _extent(plan, tokens, ())
    n_weights = sum(prod(info.shape) for info in step.before.infos.values())
    return replace(extent, n_weights=n_weights, n_blocks=len(_parameters_before(step)))


def _looking_bytes(plan: Plan, tokens: int) -> int:
    """Of methods that look at the model before they rewrite it: a block, the hidden states, and what they need themselves."""
    observing = [step for step in plan.rewrites if step.observes]
    if not observing:
        return 0
    own = max(step.method.observation_bytes(_extent_before(plan, step, tokens), step.config) for step in observing)
    block = max(max(_parameters_before(step)) for step in observing) * COMPUTE_BYTES
    return max(block, _block_bytes(plan)) + _activation_bytes(plan, tokens) + own + _making_bytes(plan)


def _making_bytes(plan: Plan) -> int:
    """Of making rewritten tensors: the block that each step has made, and the work on its largest tensor in float64."""
    total = 0
    for step in plan.rewrites:
        made = [t for t in step.tensors.values() if isinstance(t, Derived)]
        if not made:
            continue
        total += max(_parameters_before(step)) * DTYPE_BYTES[plan.float_dtype]
        whole = max((prod(t.shape) for t in made if not t.by_rows), default=0)
        square = plan.architecture.hidden_size**2
        total += 8 * (MAKING_COPIES * whole + square)
    return total


def _observation_bytes(plan: Plan, tokens: int) -> int:
    """Of methods that look at the whole model at once."""
    from compress.methods.base import LayerShape

    peak = 0
    for step in (step for stage in plan.stages for step in stage):
        layers = [plan.layers[name] for name, config in step.configs.items() if step.method.observes(config)]
        shapes = tuple(LayerShape(layer.name, layer.out_features, layer.in_features) for layer in layers)
        for config in _observing(step):
            peak = max(peak, step.method.observation_bytes(_extent(plan, tokens, shapes), config))
    return peak


def _tuning_bytes(plan: Plan, tokens: int) -> int:
    """A block with the gradient of its weights, what a pass back through it needs, hidden states, heads, a chunk's logits."""
    tuning = plan.tuning
    if tuning is None:
        return 0
    calibration, architecture = plan.recipe.calibration, plan.architecture
    in_step = tuning.rows * calibration.length
    at_once = min(tuning.rows, calibration.rows_per_batch) * calibration.length
    hidden = (tokens + in_step * (architecture.n_blocks + 1)) * architecture.hidden_size
    block = max(_block_parameters(plan), default=0) * TUNING_COPIES
    back = at_once * TUNING_HELD * (architecture.hidden_size + _widest(plan))
    head = architecture.vocab_size * architecture.hidden_size * DTYPE_BYTES[plan.float_dtype]
    chunk = max(LOGIT_BYTES, MIN_CHUNK_TOKENS * architecture.vocab_size * COMPUTE_BYTES)
    return COMPUTE_BYTES * (block + int(FRAGMENTATION * (hidden + back))) + 2 * head + LOGIT_COPIES * chunk


def _tuning_flops(plan: Plan, forward: float, tokens: int) -> float:
    """The original once; of each iteration forth, forth again and back, and both heads."""
    if plan.tuning is None:
        return 0.0
    in_step = plan.tuning.rows * plan.recipe.calibration.length * plan.tuning.iterations
    head = 2.0 * plan.architecture.vocab_size * plan.architecture.hidden_size
    return forward * tokens + in_step * (4 * forward + 3 * head)


def _observing(step: StepPlan) -> set[Any]:
    return {config for config in step.configs.values() if step.method.observes(config)}


def _evaluation_bytes(plan: Plan) -> int:
    architecture = plan.architecture
    head = architecture.vocab_size * architecture.hidden_size * DTYPE_BYTES[plan.float_dtype]
    hidden = 3 * _evaluation_tokens(plan) * architecture.hidden_size * COMPUTE_BYTES
    evaluation = plan.recipe.evaluation
    in_step = 2 if evaluation and evaluation.reference else 1  # a block of either model
    block = max(_block_parameters(plan), default=0) * COMPUTE_BYTES * in_step
    chunk = max(LOGIT_BYTES, MIN_CHUNK_TOKENS * architecture.vocab_size * COMPUTE_BYTES)
    return head * 2 + int(FRAGMENTATION * hidden) + max(block, LOGIT_COPIES * chunk)


def _evaluation_tokens(plan: Plan) -> int:
    evaluation = plan.recipe.evaluation
    assert evaluation
    if evaluation.max_tokens is not None:
        return evaluation.max_tokens
    nbytes = 0
    for data in evaluation.data:
        if data == SHIPPED:
            nbytes += heldout_text_path().stat().st_size
        elif Path(data).expanduser().is_file():
            nbytes += Path(data).expanduser().stat().st_size
        else:
            return UNKNOWN_TEXT_TOKENS
    return nbytes // BYTES_PER_TOKEN


def _seconds(plan: Plan, tokens: int) -> float:
    forward = sum(2.0 * parameters for parameters in _block_parameters(plan)) * _active_share(plan)
    flops = forward * tokens + _learning_flops(plan) + forward * tokens * len(_learning_steps(plan))
    for step, _, shapes in _site_work(plan):
        config = step.configs[shapes[0].name]
        flops += sum(r.flops(shapes[0].in_features) for r in step.method.statistics(config)) * tokens
        flops += step.method.flops(shapes, config)
        if step.method.observes(config):  # another pass, before the first block
            flops += sum(r.flops(shapes[0].in_features) for r in step.method.statistics(config)) * tokens
            flops += step.method.observation_flops(shapes, config)
    for rewrite in plan.rewrites:
        extent = _extent_before(plan, rewrite, tokens)
        flops += rewrite.method.flops(extent, rewrite.config)
        flops += rewrite.method.observation_flops(extent, rewrite.config) if rewrite.observes else 0.0
    flops += forward * tokens * sum(bool(_observing(step)) for stage in plan.stages for step in stage)
    flops += forward * _order_tokens(plan) + _tuning_flops(plan, forward, tokens)
    if plan.recipe.evaluation:
        head = 2.0 * plan.architecture.vocab_size * plan.architecture.hidden_size
        flops += 2 * (forward + 2 * head) * _evaluation_tokens(plan)
    return STARTUP_SECONDS + flops / (GEMM_EFFICIENCY * gemm_flops_per_second())


def _order_tokens(plan: Plan) -> float:
    """Tokens that run through the model to put the levels of a stack in order."""
    total = 0.0
    for step in (step for stage in plan.stages for step in stage):
        configs = {name: config for name, config in step.configs.items() if name in plan.stacked}
        if configs and step.method.stacks:
            n_levels = max(plan.stacked[name].n_levels for name in configs)
            total += step.method.order_runs(configs, n_levels) * step.method.order_rows(configs)
    return total * plan.recipe.calibration.length


def _active_share(plan: Plan) -> float:
    """The share of a block's weights that a token meets."""
    experts = plan.architecture.experts
    if experts is None:
        return 1.0
    inside = sum(s.in_features * s.out_features for s in plan.layers.values() if f".{experts.name}." in s.name)
    total = sum(_block_parameters(plan)) or 1
    return 1 - (inside / total) * (1 - experts.top_k / experts.n_experts)


def gemm_flops_per_second(size: int = 768, repeats: int = 5) -> float:
    """The best of a few float32 matrix products by numpy: about what torch reaches, without importing it."""
    import numpy

    a = numpy.ones((size, size), dtype=numpy.float32)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def available_memory() -> int:
    """Bytes that this process can still have: free memory, within the control group's and the address-space limit."""
    import resource

    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    try:
        with open("/proc/meminfo") as lines:
            limits += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    except OSError:
        pass
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        limits.append(soft)
    return min(limits)
