"""GPTQ by this package. Run by scripts/bench_peers_gptq.py."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the package beside this script, installed or not

from compress.pipeline.run import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    result = run(options.recipe, options.out)
    step, calibration = result.plan.recipe.steps[0], result.plan.recipe.calibration
    print("SETTINGS " + json.dumps({
        "version": result.report["work"]["version of compress-llm"], "transformers": version("transformers"),
        "torch": result.report["work"]["version of torch"], "compute dtype": calibration.dtype,
        **step.config.model_dump(mode="json"), "batch_size": calibration.batch_size,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
