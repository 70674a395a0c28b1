"""The tables of docs/methods/lut.md: values from look-up tables beside integer grids of as many bytes.

Each cell is a real run (`compress.run`) and its evaluation on held-out text. Prints Markdown:

    python scripts/table_lut.py                   # all tables, on the model that ships
    python scripts/table_lut.py groups rows       # some of them
    python scripts/table_lut.py --cache FILE      # goes on where it was stopped
    python scripts/table_lut.py --model FOLDER --dtype bfloat16 --calibration FILE --heldout FILE
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tables import Measure, Settings, parser, show

BITS = (4, 3, 2)
GROUP = 64
NEAREST = {"error_feedback": False, "refit": 0}
PAIRED = {4: 16, 3: 32, 2: 64}  # bits: the group size of gptq that takes about as much as a table per row of 256

GROUPS: dict[str, Settings] = {  # heading -> step, bits left out
    "`gptq`, `clip: mse`": {"gptq": {"clip": "mse"}},
    "`gptq`, `clip: mse`, `signed_scales`": {"gptq": {"clip": "mse", "signed_scales": True}},
    "`gptq`, `clip: mse`, `signed_scales`, `gptaq: 0.25`": {
        "gptq": {"clip": "mse", "signed_scales": True, "gptaq": 0.25}
    },
    "NormalFloat, `scales: absmax`, nearest": {"lut": {"table": "normal_float", "scales": "absmax", **NEAREST}},
    "NormalFloat, nearest": {"lut": {"table": "normal_float", **NEAREST}},
    "NormalFloat, feedback": {"lut": {"table": "normal_float", "refit": 0}},
    "NormalFloat, feedback, scales in the loop": {
        "lut": {"table": "normal_float", "refit": 0, "order": "gar", "static_groups": False}
    },
    "NormalFloat, feedback, refit": {"lut": {"table": "normal_float"}},
    "k-means of groups, feedback": {"lut": {"refit": 0}},
    "k-means of groups, feedback, refit": {"lut": {}},
    "k-means of groups, feedback, refit, `match: 0.5`": {"lut": {"match": 0.5}},
    "k-means of groups, feedback, refit, `match: 1`": {"lut": {"match": 1.0}},
}
ROWS: dict[str, Settings] = {
    "k-means, unweighted, nearest": {"lut": {"sensitivity": "none", **NEAREST}},
    "k-means, nearest": {"lut": NEAREST},
    "k-means, unweighted, feedback": {"lut": {"sensitivity": "none", "refit": 0}},
    "k-means, feedback": {"lut": {"refit": 0}},
    "k-means, refit of the nearest": {"lut": {"error_feedback": False}},
    "k-means, feedback, refit": {"lut": {}},
    "k-means, feedback, refit 10 times": {"lut": {"refit": 10}},
}


def main() -> None:
    tables = {"groups": groups, "rows": rows}
    asked = parser(__doc__, tables).parse_args()
    show(tables, asked.tables, Measure(asked))


def step(settings: Settings, **more: Any) -> Settings:
    ((method, own),) = settings.items()
    return {method: {**own, **more}}


def lines(measure: Measure, what: dict[str, list[Settings]]) -> Iterator[str]:
    """A line for each heading: for each of BITS its bits per weight and perplexity / KL."""
    yield "| | " + " | ".join(f"{bits} bits" for bits in BITS) + " |"
    yield "|---" * (1 + len(BITS)) + "|"
    known = {heading: [measure(each) for each in steps] for heading, steps in reversed(what.items())}
    for heading in what:
        found = known[heading]
        yield f"| {heading} | " + " | ".join(f"{each['bits']:.2f}: {each['cell']}" for each in found) + " |"


def groups(measure: Measure) -> Iterator[str]:
    """One table and scales, groups of GROUP: as many bytes as gptq's."""
    yield from lines(
        measure, {name: [step(own, bits=bits, group_size=GROUP) for bits in BITS] for name, own in GROUPS.items()}
    )


def rows(measure: Measure) -> Iterator[str]:
    """A table per row, beside gptq with smaller groups."""
    gptq = {"gptq": {"clip": "mse", "signed_scales": True}}
    paired = {
        "`gptq`, `clip: mse`, `signed_scales`, groups of " + ", ".join(map(str, PAIRED.values())): [
            step(gptq, bits=bits, group_size=size) for bits, size in PAIRED.items()
        ]
    }
    yield from lines(measure, paired | {name: [step(own, bits=bits) for bits in BITS] for name, own in ROWS.items()})


if __name__ == "__main__":
    main()
