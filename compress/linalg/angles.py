"""How far hidden states are turned, as a part of half a turn: 0 not at all, 0.5 nothing is left, 1 the opposite.

    d = mean acos(cos(before, behind)) / pi

Source: Gromov et al., 2024, arXiv:2403.17887.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def angular_distance(before: Tensor, behind: Tensor) -> float:
    """Mean over the rows of two matrices [rows, hidden]."""
    cosine = torch.nn.functional.cosine_similarity(before.double(), behind.double(), dim=-1)
    return float(cosine.clamp(-1, 1).acos().mean()) / math.pi
