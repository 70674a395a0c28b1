"""GPTQ as its paper derives it, in float64: after each column the inverse of what is left of H is formed anew."""

from __future__ import annotations

import torch
from torch import Tensor


def gptq_reference(
    weight: Tensor, damped: Tensor, scale: Tensor, zero_point: Tensor, bits: int, dtype: torch.dtype
) -> Tensor:
    """Optimal brain surgeon, one column at a time.

    Args:
        weight, scale, zero_point: [rows, in], a grid per element.
        damped: H_d [in, in].
        dtype: in which a loader holds the weight.

    Returns: the rounded weight [rows, in], float64.
    """
    work, damped = weight.double().clone(), damped.double()
    for i in range(work.shape[1]):
        inverse = torch.linalg.inv(damped[i:, i:])  # of the columns not yet rounded
        column = work[:, i].clone()
        code = (torch.round(column / scale[:, i]) + zero_point[:, i]).clamp(0, 2**bits - 1)
        rounded = ((code - zero_point[:, i]) * scale[:, i]).to(dtype).double()
        work[:, i:] -= torch.outer((column - rounded) / inverse[0, 0], inverse[0])
        work[:, i] = rounded
    return work
