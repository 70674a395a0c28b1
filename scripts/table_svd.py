"""The tables of docs/low-rank.md: what low rank loses, by method, by how ranks are allocated, and with rounding behind.

Each cell is a real run (`compress.run`) and its evaluation on held-out text. Prints Markdown:

    python scripts/table_svd.py                            # all tables, on the model that ships
    python scripts/table_svd.py methods allocations        # some of them
    python scripts/table_svd.py --cache FILE               # goes on where it was stopped
    python scripts/table_svd.py --model FOLDER --dtype bfloat16 --calibration FILE --heldout FILE --ratios 0.95 0.9 0.85 0.8
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tables import Measure, Settings, parser, show

RATIOS = (0.95, 0.9, 0.8, 0.7, 0.6)
BEST = {"allocation": "loss", "refit": 0.5}
METHODS: dict[str, Settings] = {  # heading -> step, keep_ratio to come; ranks are uniform
    "`plain`": {"svd": {"objective": "plain"}},
    "`scaled` (ASVD)": {"svd": {"objective": "scaled"}},
    "`awsvd` (LoRAP)": {"svd": {"objective": "awsvd"}},
    "`whitened` (SVD-LLM)": {"svd": {}},
    "`whitened`, `refit: 0.5`": {"svd": {"refit": 0.5}},
    "`cur`, `heal: 1`": {"cur": {"heal": 1.0}},
    "`dobi_svd`, 8 bits": {"dobi_svd": {"steps": 0}},
}
ALLOCATIONS: dict[str, Settings] = {  # heading -> step, keep_ratio to come; whitened
    "`uniform`": {"svd": {}},
    "`heavy_tail`": {"svd": {"allocation": "heavy_tail"}},
    "`energy`": {"svd": {"allocation": "energy"}},
    "`effective_rank`": {"svd": {"allocation": "effective_rank"}},
    "`lorap`": {"svd": {"allocation": "lorap"}},
    "`loss`": {"svd": {"allocation": "loss"}},
    "`loss`, `refit: 0.5`": {"svd": BEST},
}
LEARNED = {"allocation": "learned", "steps": 32, "learning_rate": 0.01}
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
GPTQ = {"group_size": 32, "clip": "mse"}
BITS = (4, 3, 2)
ROUNDED_RATIOS = (0.9, 0.8, 0.7778, 0.5556)  # of the bytes of 4 bits; the last two: those of 3 and of 2 bits
ROUNDED: dict[str, Settings] = {
    "svd, `uniform`": {"svd": {"refit": 0.5}},
    "svd, `loss`": {"svd": BEST},
}


def main() -> None:
    tables = {"methods": methods, "allocations": allocations, "learned": learned, "refit": refit, "rounded": rounded}
    arguments = parser(__doc__, tables)
    arguments.add_argument("--ratios", type=float, nargs="+", default=RATIOS, help="of the bytes that the linears take")
    asked = arguments.parse_args()
    show(tables, asked.tables, Measure(asked))


def with_ratio(step: Settings, ratio: float) -> Settings:
    ((method, settings),) = step.items()
    return {method: {"keep_ratio": ratio, **settings}}


def by_ratio(measure: Measure, columns: Mapping[str, Settings]) -> Iterator[str]:
    """Ratio by column; perplexity / KL. The size is that of the first column's result, others differ by less than a rank."""
    yield "| keep_ratio | all files | " + " | ".join(columns) + " |"
    yield "|---" * (2 + len(columns)) + "|"
    for ratio in measure.asked.ratios:
        found = [measure(with_ratio(step, ratio)) for step in columns.values()]
        cells = " | ".join(own["cell"] for own in found)
        yield f"| {ratio:g} | {found[0]['total'] / 1e6:.2f} MB | {cells} |"


def methods(measure: Measure) -> Iterator[str]:
    yield from by_ratio(measure, METHODS)


def allocations(measure: Measure) -> Iterator[str]:
    yield from by_ratio(measure, ALLOCATIONS)


def learned(measure: Measure) -> Iterator[str]:
    """Learned ranks, at 0.8 alone: learning takes longer than all else."""
    found = measure({"svd": {"keep_ratio": 0.8, **LEARNED}})
    yield f"`learned`, {LEARNED['steps']} steps, at 0.8: {found['cell']}, {sum(found['seconds'].values()):.0f} s."


def refit(measure: Measure) -> Iterator[str]:
    """Strengths of refit at 0.8; perplexity / KL."""
    yield "| `refit` | " + " | ".join(f"{strength:g}" for strength in STRENGTHS) + " |"
    yield "|---" * (1 + len(STRENGTHS)) + "|"
    for allocation in ("uniform", "loss"):
        settings = [{"keep_ratio": 0.8, "allocation": allocation, "refit": strength} for strength in STRENGTHS]
        yield f"| `{allocation}` | " + " | ".join(measure({"svd": own})["cell"] for own in settings) + " |"


def rounded(measure: Measure) -> Iterator[str]:
    """Truncation followed by 4 bits, beside rounding alone; perplexity / KL."""
    yield "| steps | bits per weight | all files | perplexity / KL |"
    yield "|---|---|---|---|"
    rows: dict[str, list[Settings]] = {f"gptq, {bits} bits": [{"gptq": {"bits": bits, **GPTQ}}] for bits in BITS}
    for ratio in ROUNDED_RATIOS:
        for heading, step in ROUNDED.items():
            rows[f"{heading}, {ratio:g}, gptq 4 bits"] = [with_ratio(step, ratio), {"gptq": {"bits": 4, **GPTQ}}]
    found = {heading: measure(*steps) for heading, steps in rows.items()}
    for heading, own in sorted(found.items(), key=lambda item: -item[1]["bits"]):
        yield f"| {heading} | {own['bits']:.3f} | {own['total'] / 1e6:.2f} MB | {own['cell']} |"


if __name__ == "__main__":
    main()
