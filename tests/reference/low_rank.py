"""Low-rank truncation as the papers write it, in numpy: inverses, Cholesky factors and all. x is [tokens, in]."""

from __future__ import annotations

import numpy as np


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def plain(weight: np.ndarray, rank: int) -> np.ndarray:
    return truncated(weight, rank)


def asvd(weight: np.ndarray, x: np.ndarray, rank: int, alpha: float) -> np.ndarray:
    """arXiv:2312.05821: W' = SVD_k(W S) S^-1, S = diag(mean |x|^alpha)."""
    scale = np.abs(x).mean(0) ** alpha
    return truncated(weight * scale, rank) / scale


def awsvd(weight: np.ndarray, x: np.ndarray, rank: int) -> np.ndarray:
    """arXiv:2404.09695: S = diag(||x_j||_2)."""
    scale = np.sqrt((x**2).sum(0))
    return truncated(weight * scale, rank) / scale


def svd_llm(weight: np.ndarray, x: np.ndarray, rank: int) -> np.ndarray:
    """arXiv:2403.07378: S the Cholesky factor of X^T X."""
    s = np.linalg.cholesky(x.T @ x)
    return truncated(weight @ s, rank) @ np.linalg.inv(s)


def svd_llm_v2(weight: np.ndarray, x: np.ndarray, rank: int) -> np.ndarray:
    """arXiv:2503.12340: X^T X = U_s S U_s^T, W' = SVD_k(W U_s S^1/2) S^-1/2 U_s^T."""
    u_s, s, _ = np.linalg.svd(x.T @ x)
    return truncated(weight @ u_s * np.sqrt(s), rank) / np.sqrt(s) @ u_s.T


def reduced_rank_ridge(
    x: np.ndarray, target: np.ndarray, prior: np.ndarray, ridge: float, rank: int | None = None
) -> np.ndarray:
    """argmin ||target - x W'^T||^2 + ridge ||prior - W'||^2 over W' [out, in] of `rank`, by least squares on stacked rows:
    fit without a limit on the rank, then project the fitted values on their first principal directions."""
    rows = np.vstack([x, np.sqrt(ridge) * np.eye(x.shape[1])])
    wanted = np.vstack([target, np.sqrt(ridge) * prior.T])
    fit = np.linalg.lstsq(rows, wanted, rcond=None)[0]  # [in, out]
    if rank is None:
        return fit.T
    _, _, vt = np.linalg.svd(rows @ fit, full_matrices=False)
    return (fit @ vt[:rank].T @ vt[:rank]).T


def output_error(weight: np.ndarray, approximation: np.ndarray, x: np.ndarray) -> float:
    return float((((weight - approximation) @ x.T) ** 2).sum())
