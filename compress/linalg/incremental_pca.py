"""Principal components of rows that come batch by batch: the step of Ross et al., 2008, as Dobi-SVD's code uses it.

    [diag(S) C; B - mean_B; sqrt(N n / (N + n)) (mean - mean_B)] = U S' V^T,      C' = first k rows of V^T

B [n, features] is the new batch, C and S the components of the N rows before it. Rows are centred on their running mean.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SEQUENCE = 2048  # tokens decomposed together, as in the published code
SEQUENCES = 8  # but at least so many


class IncrementalPCA:
    """The first `n_components` principal directions of all rows added so far: `components` [n_components, features]."""

    def __init__(self, n_components: int):
        self.n_components, self.n_seen = n_components, 0
        self.mean, self.values = torch.zeros(()), torch.zeros(0)
        self.components = torch.zeros(0, 0)

    def add(self, batch: Tensor) -> None:
        """`batch` [n, features], at least n_components rows the first time."""
        n, mean = len(batch), batch.mean(0)
        centred = batch - mean
        if self.n_seen:
            shift = math.sqrt(self.n_seen * n / (self.n_seen + n)) * (self.mean - mean)
            centred = torch.cat([self.values[:, None] * self.components, centred, shift[None]])
            mean = (self.n_seen * self.mean + n * mean) / (self.n_seen + n)
        _, values, vectors = torch.linalg.svd(centred, full_matrices=False)
        self.n_seen, self.mean = self.n_seen + n, mean
        self.values, self.components = values[: self.n_components], vectors[: self.n_components]


def output_basis(weight: Tensor, inputs: Tensor, rank: int) -> Tensor | None:
    """Orthonormal directions [out, rank], float64, of the outputs of `weight` [out, in] on `inputs` [tokens, in].

    Of every sequence of tokens the first right singular vectors of its outputs, in proportion to rank, each counted the same
    whatever its singular value; then the principal components of those. None where tokens are too few to give `rank` of them.
    """
    full = min(weight.shape)
    length = min(SEQUENCE, len(inputs) // SEQUENCES)
    if length < 1:
        return None
    own = math.ceil(rank * min(length, full) / full)
    found = IncrementalPCA(rank)
    waiting: list[Tensor] = []
    for sequence in inputs[: length * (len(inputs) // length)].split(length):
        _, _, vectors = torch.linalg.svd(sequence.double() @ weight.double().T, full_matrices=False)
        waiting.append(vectors[:own])
        if sum(map(len, waiting)) >= rank + 1:  # centring takes one direction away
            found.add(torch.cat(waiting))
            waiting = []
    if len(found.components) < rank:
        return None
    return torch.linalg.qr(found.components.T).Q
