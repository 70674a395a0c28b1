"""The README.md of a result: what it is, how it was made, how to load it. Nothing in it differs from run to run."""

from __future__ import annotations

import yaml

from compress.pipeline.plan import STANDARD, Plan


def model_card(plan: Plan) -> str:
    """A model card in the Hub's form, made from the plan alone."""
    methods = sorted({layer.method for layer in plan.layers.values()})
    front = {
        "base_model": plan.source.name,
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "tags": ["compress-llm", plan.format, *methods],
    }
    head = yaml.safe_dump(front, sort_keys=False).strip()
    return (
        f"---\n{head}\n---\n\n"
        f"# {plan.source.name}, compressed\n\n"
        f"Made by `compress-llm` with {', '.join(methods)}: the replaced layers went from "
        f"{plan.bytes_before:,} to {plan.bytes_after:,} bytes ({plan.bits_per_weight:.2f} bits per weight), all weights from "
        f"{plan.bytes_total_before:,} to {plan.bytes_total_after:,} bytes. The recipe is in `recipe.yaml`.\n\n"
        f"## Loading\n\n{_loading(plan)}\n"
    )


def _loading(plan: Plan) -> str:
    ours = (
        "With compress-llm, on its packed modules:\n\n"
        '```python\nimport compress\n\nmodel = compress.load("FOLDER_OR_ID")\n```\n'
    )
    if plan.format != STANDARD:
        return (
            f"{ours}\nAfter `import compress`, `AutoModelForCausalLM.from_pretrained` loads it too. Without the package it does "
            f"not load: {plan.format_reason}.\n"
        )
    symmetric = all(getattr(spec, "symmetric", True) for spec in plan.specs.values())
    argument = "" if symmetric else ", quantization_config=CompressedTensorsConfig(dequantize=True)"
    imports = "AutoModelForCausalLM" if symmetric else "AutoModelForCausalLM, CompressedTensorsConfig"
    stock = (
        f"With transformers and the compressed-tensors package:\n\n```python\nfrom transformers import {imports}\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER_OR_ID"{argument})\n```\n'
    )
    if not symmetric:
        stock += "\nThe grids are asymmetric: without `dequantize=True` stock transformers refuses the zero points.\n"
    return f"{stock}\n{ours}"
