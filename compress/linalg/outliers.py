"""Which magnitudes of a matrix are outliers, coarse to fine.

    coarse   T = Q3 + 1.5 (Q3 - Q1), quartiles of |w|;  candidates O = {|w| > T}
    fine     of all splits of the sorted O into kept (low) and outliers (high) the one with the largest
                 M = (min outlier - max kept)^2 - Var(kept)

The boundary is the largest that is kept. That nothing is an outlier is one of the splits, with 0 for the first term.

Source: Ding et al., 2023, arXiv:2312.07950 (CBQ), from secondary descriptions, in which the weight of Var and its sign
are not certain.
"""

from __future__ import annotations

import torch
from torch import Tensor

WHISKER = 1.5  # in distances of the quartiles


def boundary(weight: Tensor) -> float:
    """The largest magnitude of `weight`, of any shape, that is not an outlier; infinity where there are none."""
    magnitudes = weight.detach().float().abs().flatten()
    n = magnitudes.numel()
    if n < 2:
        return float("inf")
    first, third = (float(magnitudes.kthvalue(max(1, round(share * n))).values) for share in (0.25, 0.75))
    candidates = magnitudes[magnitudes > third + WHISKER * (third - first)].sort().values.double()
    if len(candidates) < 2:
        return float("inf")
    count = torch.arange(1, len(candidates) + 1, dtype=torch.float64, device=candidates.device)
    centred = candidates - candidates.mean()  # sums of squares lose fewer digits
    variance = centred.square().cumsum(0) / count - (centred.cumsum(0) / count).square()
    gaps = torch.cat([candidates.diff(), candidates.new_zeros(1)])  # behind the last there is nothing
    place = int((gaps.square() - variance).argmax())
    return float("inf") if place == len(candidates) - 1 else float(candidates[place])


def truncated(weight: Tensor) -> Tensor:
    """`weight` with its outliers cut to the boundary; itself where there are none."""
    limit = boundary(weight)
    return weight if limit == float("inf") else weight.clamp(-limit, limit)
