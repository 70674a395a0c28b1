"""What rounding activations to 8 bits costs: perplexity, and divergence from the same weights with activations kept.

    python scripts/table_activations.py [MODEL ...] [--length 256] [--windows 64]

Each MODEL is a folder of a compressed checkpoint; without any, the shipped model is rounded to 8, 4, 3 and 2 bits first (groups
of 64). The text is the one held out for the shipped model. KL is of next-token distributions, kept from rounded,
in nats per token.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import compress
from compress.calibration.data import load_tokenizer
from compress.kernels import native
from compress.kernels.choice import Activations
from compress.pipeline.run import run
from compress.recipe import Recipe
from compress.shipped import heldout_text_path


def logits(folder: Path, activations: Activations, windows: Tensor) -> Iterator[Tensor]:
    """Log-probabilities of the next token, [length - 1, vocabulary], window by window."""
    model = compress.load(folder, activations=activations)
    for window in windows:
        with torch.inference_mode():
            yield model(window[None, :-1]).logits[0].double().log_softmax(-1)


def compare(folder: Path, windows: Tensor) -> dict[str, float]:
    """Perplexities with activations kept and rounded, mean KL, and how often the likeliest token is the same."""
    kept_loss = rounded_loss = divergence = same = 0.0
    for window, kept, rounded in zip(
        windows, logits(folder, "float", windows), logits(folder, "int8", windows), strict=True
    ):
        target = window[1:, None]
        kept_loss -= kept.gather(1, target).mean().item()
        rounded_loss -= rounded.gather(1, target).mean().item()
        divergence += (kept.exp() * (kept - rounded)).sum(-1).mean().item()
        same += (kept.argmax(-1) == rounded.argmax(-1)).double().mean().item()
    n = len(windows)
    return {
        "perplexity_kept": torch.tensor(kept_loss / n).exp().item(),
        "perplexity_rounded": torch.tensor(rounded_loss / n).exp().item(),
        "kl": divergence / n,
        "same_token": same / n,
    }


def main() -> None:
    """Print a table row by row, and JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if native.absent():
        raise SystemExit(f"error: both ways would run on the references: {native.absent()}")
    rows = {}
    with tempfile.TemporaryDirectory() as temporary:
        folders = given.models or list(rounded_models(Path(temporary)))
        print("| model | activations kept | rounded | change | KL | same token |\n|---|---|---|---|---|---|")
        for folder in folders:
            ids = load_tokenizer(folder)(heldout_text_path().read_text(encoding="utf-8"))["input_ids"]
            windows = torch.tensor(ids)[: given.length * given.windows].view(-1, given.length)
            row = rows[folder.name] = compare(folder, windows)
            change = row["perplexity_rounded"] / row["perplexity_kept"] - 1
            print(
                f"| {folder.name} | {row['perplexity_kept']:.4f} | {row['perplexity_rounded']:.4f} | {100 * change:+.2f} % | "
                f"{row['kl']:.5f} | {100 * row['same_token']:.1f} % |",
                flush=True,
            )
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


def rounded_models(folder: Path) -> Iterator[Path]:
    """The shipped model, rounded to each width."""
    for bits in (8, 4, 3, 2):
        file = folder / f"{bits}.yaml"
        file.write_text(
            f"model: shipped\nsteps: [{{rtn: {{bits: {bits}, group_size: 64, clip: mse}}}}]\n"
            f"evaluation: false\noutput: {{path: {folder / f'rtn-{bits}bit'}}}\n"
        )
        yield run(Recipe.load(file)).folder


if __name__ == "__main__":
    main()
