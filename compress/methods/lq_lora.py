"""LQ-LoRA: a rounded matrix and one of low rank, each fitted by turns to what the other leaves.

    W ~ Q + L R;   (L, R) = the best pair of W - Q under M,   Q = quant(W - L R),   again and again

What is minimised, what rounds and what is stored are those of `lqer` (compress/methods/lqer.py), whose result is the first round
with `first: rounding`. The turns are not a descent; every Q is judged with its own best pair, and the best of all is stored
(compress/linalg/correction.py). So the error is never more than that of `lqer`, as long as factors are not rounded.

Factors in few bits: as many turns again with the pair as it is stored, so that the codes make good for what its bits cost.

`first`: what begins. `low_rank` is LQ-LoRA: the strongest directions of W go into the pair, and what is left is rounded, on
narrower ranges. `rounding` is LoftQ.

With quantizer=gptq the rounding itself minimises the error of the outputs of W - L R, under the same H.

Departures: the pair is exact (no random projections) and weighted by activations where the paper weighs by Fisher
information; of each round the rounded matrix is judged with the pair that suits it, not with the one it was made for. Sizes
per layer are not searched.

Sources: Guo et al., 2023, arXiv:2311.12023; Li et al., 2023, arXiv:2310.08659 (LoftQ).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.methods.lqer import LQER, LQERConfig


class LQLoRAConfig(LQERConfig):
    first: Literal["low_rank", "rounding"] = Field(
        "rounding", description="what begins: the pair, as in LQ-LoRA, or the rounding, as in LoftQ"
    )
    rounds: int = Field(10, ge=1, description="roundings at most; it stops where one is worse than the one before")

    def turns(self) -> tuple[int, bool]:
        return self.rounds, self.first == "low_rank"


class LQLoRA(LQER):
    name = "lq_lora"
    summary = "lqer, with weights rounded and corrected by turns"
    Config = LQLoRAConfig
