"""The tables of docs/methods/armor.md: 2:4 with and without wrappers, alone and followed by 4 bits.

Each row is a real run (`compress.run`) and its evaluation on held-out text. Prints Markdown:

    python scripts/table_armor.py                     # all tables, on the model that ships
    python scripts/table_armor.py blocks iterations   # some of them
    python scripts/table_armor.py --cache FILE        # goes on where it was stopped
    python scripts/table_armor.py --model FOLDER --dtype bfloat16 --calibration FILE --heldout FILE
"""

from __future__ import annotations

from collections.abc import Iterator

from tables import Measure, Settings, parser, show

SCORES = {"magnitude": "magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT", "nowag": "NoWag-P"}
BLOCKS = (4, 8, 16, 32)
ITERATIONS = (0, 30, 100, 300)
SIZE = 8  # of the blocks that `iterations` has
GPTQ = {"clip": "mse", "order": "gar"}
ROUNDED = ((4, 32), (5, 64), (6, 32))  # bits and groups of prune's core, whose sizes armor's lie among
CORE = {"bits": 4, "group_size": 64, **GPTQ}  # of armor's core


def main() -> None:
    tables = {"blocks": blocks, "iterations": iterations, "rounded": rounded}
    arguments = parser(__doc__, tables)
    arguments.add_argument("--iterations", type=int, default=100, help="of blocks and rounded")
    asked = arguments.parse_args()
    show(tables, asked.tables, Measure(asked))


def lines(measure: Measure, rows: dict[str, list[Settings]], by_size: bool = False) -> Iterator[str]:
    """A line for each row: size, proxy loss over that of NoWag-P, perplexity / KL."""
    found = {heading: measure(*steps) for heading, steps in rows.items()}
    yield "| | bits per weight | all tensors | loss / NoWag-P's | perplexity / KL |"
    yield "|---" * 5 + "|"
    for heading, own in sorted(found.items(), key=lambda item: item[1]["total"] if by_size else 0):
        ratio = "–" if own["proxy"] is None else f"{own['proxy']:.3f}"
        yield f"| {heading} | {own['bits']:.3f} | {own['total'] / 1e6:.2f} MB | {ratio} | {own['cell']} |"


def armor(measure: Measure, size: int, **settings: object) -> Settings:
    return {"armor": {"block_size": size, "n_iters": measure.asked.iterations, **settings}}


def blocks(measure: Measure) -> Iterator[str]:
    """2:4 by every score, then between wrappers with blocks of several sizes."""
    rows: dict[str, list[Settings]] = {f"`prune`, {SCORES[score]}": [{"prune": {"score": score}}] for score in SCORES}
    rows |= {f"`armor`, blocks of {size}": [armor(measure, size)] for size in BLOCKS}
    yield from lines(measure, rows)


def iterations(measure: Measure) -> Iterator[str]:
    """Both steps, several numbers of iterations."""
    rows = {
        f"`{step}`, {n_iters} iterations": [armor(measure, SIZE, n_iters=n_iters, step=step)]
        for step in ("adam", "sequential")
        for n_iters in ITERATIONS[0 if step == "adam" else 1 : None if step == "adam" else -1]
    }
    yield from lines(measure, rows)


def rounded(measure: Measure) -> Iterator[str]:
    """The core rounded to 4 bits, beside 2:4 whose bytes are as many, and beside rounding alone; by size."""
    rows: dict[str, list[Settings]] = {
        f"`prune`, {SCORES[score]}, then `gptq`, {bits} bits, groups of {size}": [
            {"prune": {"score": score}},
            {"gptq": {"bits": bits, "group_size": size, **GPTQ}},
        ]
        for score in SCORES
        for bits, size in (ROUNDED if score == "sparsegpt" else ROUNDED[:1])
    }
    for size in BLOCKS[:3]:
        rows[f"`armor`, blocks of {size}, then `gptq`, 4 bits, groups of 64"] = [armor(measure, size), {"gptq": CORE}]
    for bits in (3, 4):
        rows[f"`gptq` alone, {bits} bits, groups of 64"] = [{"gptq": {"bits": bits, "group_size": 64, **GPTQ}}]
    yield from lines(measure, rows, by_size=True)


if __name__ == "__main__":
    main()
