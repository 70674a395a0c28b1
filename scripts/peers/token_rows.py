"""Token rows for a comparison: those that a recipe's calibration draws, and others from the held-out text."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the package beside this script, installed or not

from compress import shipped
from compress.calibration.data import load_tokenizer, load_tokens
from compress.recipe import Recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True, help="JSON to write: the recipe's rows")
    parser.add_argument("--heldout", type=Path, required=True, help="JSON to write: other rows of the same length")
    parser.add_argument("--heldout-rows", type=int, default=4)
    options = parser.parse_args()
    recipe = Recipe.load(options.recipe)
    tokenizer = load_tokenizer(recipe.model.path)
    rows = load_tokens(recipe.calibration, tokenizer).rows
    options.calibration.write_text(json.dumps([row.tolist() for row in rows]))
    ids = tokenizer(shipped.heldout_text_path().read_text(encoding="utf-8"), verbose=False)["input_ids"]
    length = recipe.calibration.length
    heldout = [ids[i * length : (i + 1) * length] for i in range(options.heldout_rows)]
    assert len(heldout[-1]) == length, "the held-out text is too short"
    options.heldout.write_text(json.dumps(heldout))


if __name__ == "__main__":
    main()
