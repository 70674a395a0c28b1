"""Products with float weights as they are stored, dense or with kept places only, by compiled kernels: for few tokens.

A row of the weight is read once for up to four tokens, so a product with a handful takes as long as reading the weight. For more
than FEW tokens the weight is better expanded and multiplied by torch.
"""

from __future__ import annotations

from ctypes import Structure, byref, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from compress.kernels import native
from compress.kernels.position_layout import position_layout

FEW = 12  # tokens: from about there on, expanding the weight for a product in torch is quicker
FEW_HALVES = 128  # the same of bfloat16 on AVX-512 BF16, where rows are spread into the cache once for all tokens
KINDS = {"dense": 0, "bits": 1, "indices": 2}  # CK_ROWS_*


class Rows(Structure):
    """ck_rows, and the tensors that it points to."""

    _fields_ = [
        ("kind", c_int32),
        ("dtype", c_int32),
        ("out_features", c_int64),
        ("in_features", c_int64),
        ("values", c_void_p),
        ("n_values", c_int64),
        ("per_row", c_int64),
        ("places", c_void_p),
        ("places_stride", c_int64),
    ]
    kept: tuple[Tensor, ...]


def dense_rows(weight: Tensor) -> Rows:
    """weight [out, in], a float that has kernels."""
    weight = weight.detach().contiguous()
    n_out, n_in = weight.shape
    return _rows("dense", weight, n_out, n_in, n_in, None)


def sparse_rows(values: Tensor, positions: Tensor, n: int, m: int, in_features: int) -> Rows | None:
    """Float values and their places as sparse.py has them; None: a layout without kernels."""
    kind = position_layout(n, m).kind
    if kind not in KINDS or values.dtype not in native.DTYPES:
        return None
    values, positions = values.detach().contiguous(), positions.detach().contiguous()
    return _rows(kind, values, len(positions), in_features, in_features // m * n if m else 0, positions)


def _rows(kind: str, values: Tensor, n_out: int, n_in: int, per_row: int, places: Tensor | None) -> Rows:
    rows = Rows(
        KINDS[kind], native.DTYPES[values.dtype], n_out, n_in, values.data_ptr(), values.numel(), per_row,
        None if places is None else places.data_ptr(), 0 if places is None else places.shape[1],
    )  # fmt: skip
    rows.kept = (values,) if places is None else (values, places)
    return rows


def few(rows: Rows, x: Tensor) -> int:
    """Up to how many tokens like x a product with rows is quicker than expanding them for torch."""
    halves = rows.dtype == native.DTYPES[x.dtype] == native.DTYPES[torch.bfloat16]
    return FEW_HALVES if halves and native.current_isa() == "avx512bf16" else FEW


def multiplied(x: Tensor, rows: Rows, bias: Tensor | None, out: Tensor, add: bool = False) -> Tensor:
    """out = x W^T + bias, or added to `out`. x [tokens, in] with dense rows, out [tokens, out], of any dtypes with kernels."""
    library = native.library()
    assert library is not None
    bias = None if bias is None else bias.detach().contiguous()
    threads, n_bytes = torch.get_num_threads(), library.ck_rows_workspace(rows.in_features, len(x))
    workspace = torch.empty(max(n_bytes, 0), dtype=torch.uint8)
    status = library.ck_rows_linear(
        byref(rows), x.data_ptr(), native.DTYPES[x.dtype], len(x), x.stride(0), None if bias is None else bias.data_ptr(),
        0 if bias is None else native.DTYPES[bias.dtype], out.data_ptr(), native.DTYPES[out.dtype], out.stride(0), add,
        workspace.data_ptr(), workspace.numel(), threads,
    )  # fmt: skip
    native.check(status, "a product with rows")
    return out


def expanded(rows: Rows, dtype: torch.dtype) -> Tensor:
    """The weight [out, in]."""
    library = native.library()
    assert library is not None
    weight = torch.empty(rows.out_features, rows.in_features, dtype=dtype)
    status = library.ck_rows_dense(
        byref(rows), weight.data_ptr(), native.DTYPES[dtype], rows.in_features, torch.get_num_threads()
    )
    native.check(status, "expanding rows")
    return weight


def flat_input(x: Tensor, in_features: int) -> Tensor:
    """[tokens, in_features], rows dense."""
    return x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, in_features).contiguous()
