"""The singular value decomposition with its gradient written out, and the truncation made of it, term by term.

G_Y = U [(skew(U^T G_U) o F) S + S (skew(V^T G_V) o F) + diag(G_S)] V^T
      + (I - U U^T) G_U S^-1 V^T + U S^-1 G_V^T (I - V V^T),      skew(M) = M - M^T,  F_ij = 1 / (s_j^2 - s_i^2)
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.linalg.svd_gradient import gate


class Decomposition(torch.autograd.Function):
    @staticmethod
    def forward(ctx, matrix: Tensor, gap) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        ctx.save_for_backward(u, s, vh.T)
        ctx.gap = gap
        return u, s, vh.T.clone()

    @staticmethod
    def backward(ctx, to_u, to_s, to_v):
        u, s, v = ctx.saved_tensors
        f = ctx.gap(s) * torch.sign(s - s[:, None])  # s_j > s_i: positive
        uu, vv = u.T @ to_u, v.T @ to_v
        core = ((uu - uu.T) * f) * s + s[:, None] * ((vv - vv.T) * f) + to_s.diag()
        outside_u = to_u - u @ uu
        outside_v = to_v - v @ vv
        return u @ core @ v.T + (outside_u / s) @ v.T + u @ (outside_v / s).T, None


def plain_gap(s: Tensor) -> Tensor:
    """1 / |s_i^2 - s_j^2|, 0 on the diagonal."""
    difference = (s[:, None] ** 2 - s**2).abs()
    return torch.where(difference > 0, 1 / difference, 0.0)


def truncate(matrix: Tensor, position: Tensor, beta: float, gap=plain_gap) -> Tensor:
    u, s, v = Decomposition.apply(matrix, gap)
    return (u * (s * gate(position, len(s), beta))) @ v.T


def inverse_gap(a: float, b: float, terms: int) -> float:
    """One pair, a >= b > 0."""
    ratio = (b / a) ** 2
    if 1 - ratio < 1 / (terms + 1):
        return sum(ratio**k for k in range(terms + 1)) / a**2
    return 1 / ((a - b) * (a + b))
