"""The tables of docs/methods/lqer.md and lq_lora.md: codes with a low-rank correction beside finer codes of as many bytes.

Each row is a real run (`compress.run`) and its evaluation on held-out text. Prints Markdown:

    python scripts/table_lqer.py                     # all tables, on the model that ships
    python scripts/table_lqer.py 2bits factors       # some of them
    python scripts/table_lqer.py --cache FILE        # goes on where it was stopped
    python scripts/table_lqer.py --model FOLDER --dtype bfloat16 --calibration FILE --heldout FILE
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from tables import Measure, Settings, parser, show

from compress.errors import RecipeError

GRID: Settings = {"signed_scales": True}
FINER = {2: (64, 32, 16), 3: (64, 32), 4: (64, 32)}  # groups of gptq alone
RANKS = {
    2: ((64, 4), (64, 8), (64, 16), (128, 16)),
    3: ((64, 8), (64, 16)),
    4: ((64, 8),),
}  # groups and ranks of lq_lora
TURNS: Settings = {"first": "low_rank", "rounds": 3}
AIM = 1.0  # refit
GPTAQ = 0.5  # of gptq alone, to the same end


def main() -> None:
    tables = {f"{bits}bits": partial(sizes, bits) for bits in (2, 3, 4)} | {"factors": factors, "parts": parts}
    asked = parser(__doc__, tables).parse_args()
    show(tables, asked.tables, Measure(asked))


def gptq(bits: int, group: int, **settings: Any) -> Settings:
    return {"gptq": {"bits": bits, "group_size": group, "clip": "mse", **GRID, **settings}}


def corrected(method: str, bits: int, rank: int, group: int = 64, factor_bits: int = 4, **settings: Any) -> Settings:
    own = {"bits": bits, "group_size": group, "rank": rank, "factor_bits": factor_bits, **GRID, **settings}
    return {method: own}


def lines(measure: Measure, rows: dict[str, Settings], by_size: bool = True) -> Iterator[str]:
    """A line for each row: size, what of the rounding's error is left on the calibration inputs, perplexity / KL. Rows whose
    groups do not divide the model's layers are left out."""
    found = {}
    for heading, step in rows.items():
        with suppress(RecipeError):
            found[heading] = measure(step)
    yield "| | bits per weight | all tensors | error left | perplexity / KL |"
    yield "|---" * 5 + "|"
    for heading, own in sorted(found.items(), key=lambda item: item[1]["total"] if by_size else 0):
        ratio = "–" if own["proxy"] is None else f"{own['proxy']:.3f}"
        yield f"| {heading} | {own['bits']:.3f} | {own['total'] / 1e6:.2f} MB | {ratio} | {own['cell']} |"


def sizes(bits: int, measure: Measure) -> Iterator[str]:
    """Corrections of several ranks, with and without an eye on the original's inputs, beside gptq in smaller groups; by size."""
    rows = {f"`gptq`, groups of {group}": gptq(bits, group) for group in FINER[bits]}
    rows[f"`gptq`, groups of 32, `gptaq: {GPTAQ}`"] = gptq(bits, 32, gptaq=GPTAQ)
    rows["`lqer`, groups of 64, rank 8"] = corrected("lqer", bits, 8)
    rows["`lqer`, groups of 64, rank 8, `refit: 1`"] = corrected("lqer", bits, 8, refit=AIM)
    rows["`lqer`, groups of 32, rank 1, `refit: 1`"] = corrected("lqer", bits, 1, 32, refit=AIM)  # what refit does
    for group, rank in RANKS[bits]:
        rows[f"`lq_lora`, groups of {group}, rank {rank}, `refit: 1`"] = corrected(
            "lq_lora", bits, rank, group, **TURNS, refit=AIM
        )
    yield from lines(measure, rows)


def factors(measure: Measure) -> Iterator[str]:
    """Bits of the factors, 2 bits of weights; by size."""
    rows = {
        f"rank {rank}, factors of {factor_bits} bits": corrected("lqer", 2, rank, 64, factor_bits, refit=AIM)
        for rank, factor_bits in ((2, 16), (8, 16), (8, 8), (8, 4))
    }
    yield from lines(measure, rows)


def parts(measure: Measure) -> Iterator[str]:
    """What each part does, 2 bits, groups of 64, rank 8."""
    lqer, turns = partial(corrected, "lqer", 2, 8), partial(corrected, "lq_lora", 2, 8)
    rows = {
        "`lqer`, `quantizer: rtn, objective: plain`": lqer(quantizer="rtn", objective="plain"),
        "`lqer`, `quantizer: rtn`": lqer(quantizer="rtn"),
        "`lqer`": lqer(),
        "`lqer`, `refit: 1`": lqer(refit=AIM),
        "`lqer`, `quantizer: lut, refit: 1`": lqer(quantizer="lut", refit=AIM),
        "`lq_lora`, `first: rounding, rounds: 3`": turns(first="rounding", rounds=3),
        "`lq_lora`, `first: low_rank, rounds: 3`": turns(**TURNS),
        "`lq_lora`, `first: low_rank, rounds: 3, refit: 1`": turns(**TURNS, refit=AIM),
    }
    yield from lines(measure, rows, by_size=False)


if __name__ == "__main__":
    main()
