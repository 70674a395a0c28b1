"""`compress plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.cli.options import Debug, Json, Layers, ModelArgument, Overrides, RecipeFile, recipe_overrides

if TYPE_CHECKING:
    from compress.pipeline.plan import Plan


def plan(
    recipe: RecipeFile,
    model: ModelArgument = None,
    overrides: Overrides = None,
    layers: Layers = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what `compress run` would do: stages, layers, bytes, format, memory, time. No weights are read.

    \b
    Example:  compress plan --recipe llama3-4bit meta-llama/Llama-3.2-1B --set steps.0.gptq.bits=3
    """
    from compress.cli.show import note, print_json, show
    from compress.cli.show import out as say
    from compress.pipeline.plan import plan as make_plan
    from compress.recipe import Recipe

    planned = make_plan(Recipe.load(recipe, recipe_overrides(model, overrides)))
    if as_json:
        print_json(planned.to_dict())
        return
    if planned.layers:
        show(layer_table(planned, one_each=layers))
        say("")
    show(short(planned))
    for warning in planned.warnings:
        note(f"warning: {warning}")


def layer_table(planned: Plan, one_each: bool) -> Any:
    """Every replaced layer: what it becomes and what it weighs."""
    from compress.cli.layers import alike, describe
    from compress.cli.show import human_bytes, table

    kinds = {
        name: (layer.out_features, layer.in_features, layer.method, layer.spec, layer.bytes_before, layer.bytes_after)
        for name, layer in planned.layers.items()
    }
    rows = []
    for name, (n_out, n_in, method, spec, before, after), count in alike(kinds, one_each):
        bits = f"{8 * after / (n_out * n_in):.3f}"
        sizes = human_bytes(count * before), human_bytes(count * after)
        rows.append((name, str(count), f"{n_out} x {n_in}", method, describe(spec), *sizes, bits))
    columns = ("layers", ">n", ">shape", "method", "representation", ">before", ">after", ">bits per weight")
    return table(columns, rows)


def _stack_lines(planned: Plan) -> list[str]:
    """The sizes that the result can be loaded at, of a method that stacks."""
    from compress.cli.show import human_bytes

    stack = planned.to_dict()["stack"]
    if stack is None:
        return []
    lines = [f"loads at any size from {human_bytes(stack['minimum'])} to {human_bytes(stack['maximum'])}"]
    return lines + [
        f"level {level['level']}: {human_bytes(level['bytes'])} in {level['layers']} layers, "
        f"{level['bits_per_weight']:.3f} bits per weight so far"
        for level in stack["levels"]
    ]


def short(planned: Plan) -> Any:
    """The plan in a few lines."""
    from compress.cli.show import human_bytes, human_time, pairs, percent

    def change(before: int, after: int) -> str:
        return f"{human_bytes(before)} -> {human_bytes(after)} ({percent(after, before)})"

    architecture = planned.architecture
    rows = [
        (
            "model",
            f"{planned.source.name}: {architecture.family}, {architecture.n_blocks} blocks, {planned.float_dtype}",
        )
    ]
    rows += [("rewritten", f"{step.method.name}: {step.rewrite.note}") for step in planned.rewrites]
    for number, stage in enumerate(planned.stages):
        steps = "; then ".join(f"{step.method.name} on {len(step.configs)} layers" for step in stage) or "nothing else"
        data = ", calibrated" if any(step.needs_data for step in stage) else ", without data"
        rows.append((f"stage {number + 1} of {len(planned.stages)}", f"one pass over the blocks: {steps}{data}"))
    if planned.tuning is not None:
        tuning = planned.tuning
        rows.append(
            (
                "tuned",
                f"{tuning.method.name}: {tuning.iterations} iterations of {tuning.rows} rows, over the whole model",
            )
        )
    if planned.needs_data:
        calibration = planned.recipe.calibration
        data = ", ".join(calibration.data or ())
        rows.append(("calibration", f"{calibration.samples} x {calibration.length} tokens of {data}"))
    if planned.layers:
        replaced = change(planned.bytes_before, planned.bytes_after)
        rows.append(("replaced", f"{replaced}, {planned.bits_per_weight:.3f} bits per weight"))
    rows += [("stack", line) for line in _stack_lines(planned)]
    disk = f"{human_bytes(planned.bytes_kept)} of matrices until the run is finished, beside the result"
    rows += [
        ("all tensors", change(planned.bytes_total_before, planned.bytes_total_after)),
        ("format", f"{planned.format}: {planned.format_reason}"),
        ("peak memory", f"about {human_bytes(planned.peak_bytes)}"),
        *([("disk", disk)] if planned.bytes_kept else []),
        ("time", f"about {human_time(planned.seconds)}, by the speed of this machine's CPU just now"),
    ]
    return pairs(rows)
