"""The tables of docs/methods/prune.md: what pruning loses, by score, pattern and order, and what comes after.

Each cell is a real run (`compress.run`) and its evaluation on held-out text. Prints Markdown:

    python scripts/table_prune.py                     # all tables, on the model that ships
    python scripts/table_prune.py scores rounded      # some of them
    python scripts/table_prune.py --model FOLDER --calibration FILE --heldout FILE --length 512
"""

from __future__ import annotations

from collections.abc import Iterator

from tables import Measure, Settings, parser, show

SCORES = {"magnitude": "magnitude", "wanda": "Wanda", "nowag": "NoWag-P", "sparsegpt": "SparseGPT"}
PATTERNS: dict[str, Settings] = {"2:4": {"pattern": "2:4"}, "50 % anywhere": {"sparsity": 0.5}}
FOUR = {"bits": 4, "group_size": 32, "clip": "mse"}
ORDERS = ("none", "act", "best")
MORE: dict[str, Settings] = {
    "1:4": {"pattern": "1:4"},
    "2:4": {"pattern": "2:4"},
    "4:8": {"pattern": "4:8"},
    "8:16": {"pattern": "8:16"},
    "50 %": {"sparsity": 0.5},
    "3:4": {"pattern": "3:4"},
    "25 %": {"sparsity": 0.25},
    "75 %": {"sparsity": 0.75},
}


def main() -> None:
    tables = {"scores": scores, "rounded": rounded, "orders": orders, "patterns": patterns}
    asked = parser(__doc__, tables).parse_args()
    show(tables, asked.tables, Measure(asked))


def scores(measure: Measure) -> Iterator[str]:
    """Score by pattern, alone and followed by 4 bits; perplexity / KL."""
    columns = [(name, own, after) for after in (False, True) for name, own in PATTERNS.items()]
    found = {
        score: [measure({"prune": {"score": score, **own}}, *([{"gptq": FOUR}] * after)) for _, own, after in columns]
        for score in SCORES
    }
    yield "| score | " + " | ".join(name + ", then gptq 4 bits" * after for name, _, after in columns) + " |"
    yield "|---" * (1 + len(columns)) + "|"
    yield "| bits per weight | " + " | ".join(f"{own['bits']:.3f}" for own in found["magnitude"]) + " |"
    yield "| all tensors | " + " | ".join(f"{own['total'] / 1e6:.2f} MB" for own in found["magnitude"]) + " |"
    for score, cells in found.items():
        yield f"| {SCORES[score]} | " + " | ".join(own["cell"] for own in cells) + " |"


def rounded(measure: Measure) -> Iterator[str]:
    """SparseGPT and rounding, in one loop and one after the other, beside rounding alone; perplexity / KL."""
    rows: dict[str, list[Settings]] = {f"gptq, {b} bits": [{"gptq": {**FOUR, "bits": b}}] for b in (4, 3, 2)}
    for name, own in PATTERNS.items():
        for bits in (4, 3):
            rows[f"{name}, {bits} bits in the same loop"] = [{"prune": {**own, **FOUR, "bits": bits}}]
            rows[f"{name}, then gptq, {bits} bits"] = [{"prune": own}, {"gptq": {**FOUR, "bits": bits}}]
        rows[f"{name}, then rtn, 4 bits"] = [{"prune": own}, {"rtn": FOUR}]
    found = {heading: measure(*steps) for heading, steps in rows.items()}
    yield "| steps | bits per weight | all tensors | perplexity / KL |"
    yield "|---|---|---|---|"
    for heading, own in sorted(found.items(), key=lambda item: -item[1]["bits"]):
        yield f"| {heading} | {own['bits']:.3f} | {own['total'] / 1e6:.2f} MB | {own['cell']} |"


def orders(measure: Measure) -> Iterator[str]:
    """SparseGPT's order of the groups; perplexity / KL."""
    yield "| `order` | " + " | ".join(f"`{order}`" for order in ORDERS) + " |"
    yield "|---" * (1 + len(ORDERS)) + "|"
    for name, own in (("2:4", {}), ("2:4, 4 bits in the same loop", FOUR)):
        yield f"| {name} | " + " | ".join(measure({"prune": {**own, "order": o}})["cell"] for o in ORDERS) + " |"


def patterns(measure: Measure) -> Iterator[str]:
    """SparseGPT by pattern."""
    yield "| pattern | bits per weight | all tensors | perplexity / KL |"
    yield "|---|---|---|---|"
    for name, settings in MORE.items():
        own = measure({"prune": settings})
        yield f"| {name} | {own['bits']:.3f} | {own['total'] / 1e6:.2f} MB | {own['cell']} |"


if __name__ == "__main__":
    main()
