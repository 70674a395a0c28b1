"""Products with block-diagonal matrices, which are kept as their blocks [n_blocks, size, size]."""

from __future__ import annotations

import torch
from torch import Tensor

WIDE = 16  # columns that products of columns like to have at least


def block_left(blocks: Tensor, matrix: Tensor, out: Tensor | None = None) -> Tensor:
    """diag(blocks) @ matrix [rows, columns]; into `out`, contiguous and another than `matrix`, if given."""
    out = torch.empty_like(matrix, memory_format=torch.contiguous_format) if out is None else out
    size = blocks.shape[-1]
    torch.bmm(blocks, matrix.unflatten(0, (-1, size)), out=out.unflatten(0, (-1, size)))
    return out


def block_right(matrix: Tensor, blocks: Tensor, out: Tensor | None = None) -> Tensor:
    """matrix [rows, columns] @ diag(blocks); `out` as in `block_left`."""
    out = torch.empty_like(matrix, memory_format=torch.contiguous_format) if out is None else out
    blocks = widened(blocks)
    size = blocks.shape[-1]
    torch.bmm(column_blocks(matrix, size), blocks, out=column_blocks(out, size))
    return out


def column_products(left: Tensor, right: Tensor, size: int) -> Tensor:
    """left^T @ right for two matrices [rows, columns], only the diagonal blocks of it: [columns / size, size, size]."""
    joined = _joined(left.shape[1] // size, size)
    products = torch.bmm(column_blocks(left, joined * size).mT, column_blocks(right, joined * size))
    if joined == 1:
        return products
    return products.view(-1, joined, size, joined, size).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).flatten(0, 1)


def widened(blocks: Tensor) -> Tensor:
    """The same matrix in larger blocks, zeros included, where products of columns with such small ones would be slow."""
    n_blocks, size, _ = blocks.shape
    joined = _joined(n_blocks, size)
    if joined == 1:
        return blocks
    wide = blocks.new_zeros(n_blocks // joined, joined, size, joined, size)
    wide.diagonal(dim1=1, dim2=3).copy_(blocks.view(-1, joined, size, size).permute(0, 2, 3, 1))
    return wide.view(-1, joined * size, joined * size)


def _joined(n_blocks: int, size: int) -> int:
    """How many neighbouring blocks to take together: as many as give WIDE columns, or fewer that divide all."""
    return next(n for n in range(max(WIDE // size, 1), 0, -1) if n_blocks % n == 0)


def column_blocks(matrix: Tensor, size: int) -> Tensor:
    """[rows, columns] seen as [columns / size, rows, size]."""
    return matrix.unflatten(1, (-1, size)).transpose(0, 1)


def block_linear(x: Tensor, blocks: Tensor) -> Tensor:
    """x [..., n] times the transpose of diag(blocks): each block meets its own inputs. In the dtype of x."""
    n_blocks, size, _ = blocks.shape
    pieces = x.reshape(-1, n_blocks, size).transpose(0, 1)  # [blocks, tokens, size]
    return torch.bmm(pieces, blocks.to(x.dtype).transpose(1, 2)).transpose(0, 1).reshape(x.shape)


def block_dense(blocks: Tensor) -> Tensor:
    """diag(blocks) with its zeros: [n, n]."""
    return torch.block_diag(*blocks)


def identity_blocks(n: int, size: int, like: Tensor) -> Tensor:
    """The blocks of the identity [n, n]; `size` divides n."""
    return torch.eye(size, dtype=like.dtype, device=like.device).repeat(n // size, 1, 1)
