"""Factors of low rank, most of them in 8 bits, as `modules/remapped_spec.py` stores them: left [out, rank], right [rank, in].

    left right = U diag(sigma) V^T         the singular values go into the longer factor, say left = P = U diag(sigma)
    codes      = round(v / scale), scale = max |v| / 127,      of each column v of V, and of the first s = min(out, in)
                                                               entries of each column of P; the others stay floats

Codes are evenly spaced. The paper's are those of 8-bit optimizers, denser near 0 (`dynamic map`); singular vectors are nearly
Gaussian, largest entry about 4 standard deviations, where that costs half as much again: relative error of the weights of
the model that ships, at full rank, 1.38 % by the dynamic map, 0.91 % by even steps, 0.71 % by those and the refit:

The shorter factor is rounded first and the longer one fitted to it before it is rounded in turn, so that it takes up what the
first rounding did (`low_rank.refitted_left`), under the inputs' second moment where that is known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import NumericsError
from compress.linalg.low_rank import fixed_signs, refitted_left

LARGEST = 127  # of a code; -128 is not used, so that a vector and its negative are alike
REFIT_DAMPING = 1e-6  # of the mean of the diagonal: enough to solve


def remap(left: Tensor, right: Tensor, dtype: torch.dtype, moment: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors of `RemappedSpec` for left @ right, by name; floats in `dtype`.

    Args:
        left [out, rank], right [rank, in], rank <= min(out, in).
        moment: H [in, in] of the inputs, or None for the identity.

    Raises: NumericsError if the refit fails, or what goes in is not finite.
    """
    u, sigma, v = product_svd(left.double(), right.double())
    out_features, in_features = left.shape[0], right.shape[1]
    short = min(out_features, in_features)
    if out_features >= in_features:
        right_code, right_scale = rounded_vectors(v, dtype)
        long = refitted_left(u * sigma, v.T, _decoded(right_code, right_scale).T, moment, REFIT_DAMPING)
        left_code, left_scale = rounded_vectors(long[:short], dtype)
    else:
        left_code, left_scale = rounded_vectors(u, dtype)
        long = refitted_left(v * sigma, u.T, _decoded(left_code, left_scale).T, None, REFIT_DAMPING)
        right_code, right_scale = rounded_vectors(long[:short], dtype)
    stored = {
        "left_code": left_code,
        "left_scale": left_scale,
        "right_code": right_code.T.contiguous(),
        "right_scale": right_scale,
    }
    if len(long) > short:
        rest = long[short:].to(dtype)
        stored["rest"] = (rest if out_features > in_features else rest.T).contiguous()
    return stored


def product_svd(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, rank], sigma [rank], V [in, rank] of left @ right, without forming it."""
    left_basis, left_rest = torch.linalg.qr(left)
    right_basis, right_rest = torch.linalg.qr(right.T)
    try:
        u, sigma, vh = torch.linalg.svd(left_rest @ right_rest.T)
    except torch.linalg.LinAlgError as error:
        raise NumericsError(f"the singular values of the factors: {' '.join(str(error).split())}") from None
    u, v = left_basis @ u, right_basis @ vh.T
    signs = torch.where((fixed_signs(u) * u).sum(0) < 0, -1.0, 1.0).to(u)
    return u * signs, sigma, v * signs


def rounded_vectors(vectors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes int8 [n, rank] of the columns of `vectors`, and the scale [rank] in `dtype` by which they are multiplied.

    Codes are chosen for the scale as it is stored. A column of zeros has scale 0.
    """
    scale = (vectors.abs().amax(0) / LARGEST).to(dtype)
    step = scale.to(vectors.dtype)
    codes = torch.where(step > 0, vectors / torch.where(step > 0, step, 1.0), 0.0).round()
    return codes.clamp(-LARGEST, LARGEST).to(torch.int8), scale


def _decoded(codes: Tensor, scale: Tensor) -> Tensor:
    """float64 [n, rank]."""
    return codes.double() * scale.double()
