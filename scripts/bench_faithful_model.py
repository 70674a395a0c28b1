"""Perplexity of a whole model by our GPTQ and by the original code, in one pipeline, on the same tokens.

    git clone https://github.com/IST-DASLab/gptq
    python scripts/bench_faithful_model.py --reference gptq

Block after block, site after site, both get the second moments of the inputs that their own earlier layers leave. Scales
stay in float32, as the original never rounds them. "ours" and "original" are at equal settings; "our default" is act-order
with static groups. Fails if our perplexity is above the original's by more than 0.5 %.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import compress
from compress import methods
from compress.modules import spec
from compress.recipe import Recipe

WORST_RATIO = 1.005


def perplexity(arguments: argparse.Namespace, step: dict[str, Any]) -> tuple[float, float, float]:
    """(perplexity, KL, perplexity of the original model)."""
    recipe = Recipe.from_dict(
        {
            "model": {"path": arguments.model, "dtype": "float32"},
            "calibration": {"data": arguments.calibration, "samples": arguments.samples, "length": arguments.length},
            "steps": [step],
            "evaluation": {
                "data": arguments.evaluation,
                "length": arguments.length,
                "max_tokens": arguments.max_tokens,
            },
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        found = compress.run(recipe, Path(folder) / "out").report["evaluation"]
    return found["model"]["perplexity"], found["fidelity"]["kl_mean"], found["reference"]["perplexity"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="a checkout of IST-DASLab/gptq")
    parser.add_argument("--model", default="shipped")
    parser.add_argument("--calibration", default="shipped")
    parser.add_argument("--evaluation", default="shipped")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=None)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--group-size", type=int, nargs="+", default=[128, 64])
    arguments = parser.parse_args()
    os.environ["REFERENCE"] = str(arguments.reference.resolve())
    methods.METHODS["gptq_reference"] = "reference_gptq:ReferenceGPTQ"
    spec.SPECS["dense_float32"] = "reference_gptq:DenseSpec"

    print("| bits | group | order | original | ours | ratio | KL original | KL ours |\n|--|--|--|--|--|--|--|--|")
    worst = 0.0
    for bits in arguments.bits:
        for group_size in arguments.group_size:
            for order in ("none", "act"):
                same = {"bits": bits, "group_size": group_size, "order": order}
                theirs, kl_theirs, _ = perplexity(arguments, {"gptq_reference": same})
                ours, kl_ours, dense = perplexity(arguments, {"gptq": {**same, "static_groups": order == "act"}})
                ratio = ours / theirs
                worst = max(worst, ratio)
                print(
                    f"| {bits} | {group_size} | {order} | {theirs:.3f} | {ours:.3f} | {ratio:.4f} | {kl_theirs:.5f} "
                    f"| {kl_ours:.5f} |",
                    flush=True,
                )
    print(f"\nuncompressed {dense:.3f}; worst ratio {worst:.4f}, allowed {WORST_RATIO}")
    return int(worst > WORST_RATIO)


if __name__ == "__main__":
    raise SystemExit(main())
