"""Text cut into windows for perplexity, as the literature does it.

The texts are joined, tokenized once, and cut into windows of `length` tokens that do not overlap; what is left at the end is
dropped. Every token but the first of a window is predicted. With a `stride` below `length` windows overlap, and each token
is predicted once, with at least `length - stride` tokens before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import RecipeError


@dataclass(frozen=True)
class Windows:
    """Windows [n, length] of token ids; `first_scored[i]` is the first position of window i whose prediction counts.

    Position p of a window is predicted from position p - 1, so `first_scored` is at least 1.
    """

    ids: Tensor
    first_scored: Tensor
    stride: int
    n_text_tokens: int
    n_text_bytes: int
    bos: bool

    @property
    def n_scored(self) -> int:
        return int((self.ids.shape[1] - self.first_scored).sum())

    @property
    def bytes_per_token(self) -> float:
        return self.n_text_bytes / self.n_text_tokens

    def targets(self) -> tuple[Tensor, Tensor]:
        """(next token ids, whether the prediction counts), both [n, length]; the last position predicts nothing."""
        n, length = self.ids.shape
        following = torch.cat([self.ids[:, 1:], self.ids.new_zeros(n, 1)], dim=1)
        position = torch.arange(length).expand(n, length) + 1
        counts = (position >= self.first_scored[:, None]) & (position < length)
        return following, counts


def cut_windows(
    ids: Tensor, length: int, n_bytes: int, stride: int | None = None, max_tokens: int | None = None, bos: bool = False
) -> Windows:
    """Cut token ids [n_tokens] of a text of `n_bytes` bytes into windows.

    Raises: RecipeError if the text is shorter than one window.
    """
    stride = stride or length
    if not 1 <= stride <= length or length < 2:
        raise RecipeError(f"evaluation: length {length} and stride {stride}: use 2 <= length and 1 <= stride <= length")
    n_text_tokens = len(ids)
    used = ids if max_tokens is None else ids[: max(max_tokens, length)]
    n = (len(used) - length) // stride + 1
    if n < 1:
        raise RecipeError(
            f"evaluation: the text has {len(used):,} tokens, one window needs {length:,}; use more text or a smaller "
            f"evaluation.length"
        )
    windows = used.unfold(0, length, stride)[:n]
    first = torch.full((n,), length - stride if stride < length else 1)
    first[0] = 1
    return Windows(windows.contiguous(), first, stride, n_text_tokens, n_bytes, bos)
