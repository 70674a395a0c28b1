"""How well a model predicts a text, and how close it stays to the model it was made from.

    perplexity     exp of the mean negative log-likelihood per token
    bits per byte  the same in bits, per byte of text: comparable between tokenizers
    KL             sum_v p(v) (log p(v) - log q(v)), p the reference's next-token distribution, q the model's, per position
    top-1          the share of positions where both find the same token most likely

Logits are made chunk by chunk from final normed hidden states and never kept: a vocabulary of 128k makes them thirty times
the size of the hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.calibration.store import HiddenStates
from compress.errors import NumericsError
from compress.evaluation.chunks import LOGIT_BYTES, MIN_CHUNK_TOKENS
from compress.evaluation.windows import Windows

Logits = Callable[[Tensor], Tensor]  # final normed hidden states [1, tokens, hidden] -> logits [1, tokens, vocabulary]


@dataclass
class Scores:
    """What was found out about one model on one text."""

    nll: float = 0.0
    n_scored: int = 0

    def add(self, logits: Tensor, norm: Tensor, targets: Tensor, counts: Tensor) -> None:
        """Count the predictions of `targets` [tokens] where `counts`. `norm` is the logsumexp of `logits`."""
        nll = norm - logits.gather(1, targets[:, None])[:, 0]
        self.nll += float(nll[counts].double().sum())
        self.n_scored += int(counts.sum())

    def to_dict(self, windows: Windows) -> dict[str, Any]:
        mean = self.nll / self.n_scored
        return {
            "perplexity": math.exp(mean) if mean < 700 else math.inf,
            "nll_per_token": mean,
            "bits_per_byte": mean / math.log(2) / windows.bytes_per_token,
            "scored_tokens": self.n_scored,
        }


def score(windows: Windows, hidden: HiddenStates, logits: Logits, vocab_size: int, where: str) -> Scores:
    """Negative log-likelihood of the text under one model, from its final normed hidden states (batches of windows)."""
    scores = Scores()
    for normed, targets, counts in _chunks(windows, hidden, vocab_size):
        values = logits(normed).float()[0]
        scores.add(values, values.logsumexp(-1), targets, counts)
    if not math.isfinite(scores.nll):
        raise NumericsError(f"{where}: the logits are not finite; the model is broken: see the report's layer losses")
    return scores


def compare(
    windows: Windows,
    reference: HiddenStates,
    reference_logits: Logits,
    hidden: HiddenStates,
    logits: Logits,
    vocab_size: int,
    where: str,
) -> tuple[Scores, Scores, dict[str, float]]:
    """Score reference and model on the same text, and compare their next-token distributions at every position.

    Returns: (reference's scores, the model's, {"kl_mean", "kl_median", "kl_p99", "kl_max", "top1_agreement", "positions"}).
    """
    ours, theirs = Scores(), Scores()
    divergences: list[Tensor] = []
    agreed = positions = 0
    pairs = zip(_chunks(windows, reference, vocab_size), _chunks(windows, hidden, vocab_size), strict=True)
    for (normed_p, targets, counts), (normed_q, _, _) in pairs:
        p, q = reference_logits(normed_p).float()[0], logits(normed_q).float()[0]  # [tokens, vocabulary]
        norm_p, norm_q = p.logsumexp(-1), q.logsumexp(-1)
        theirs.add(p, norm_p, targets, counts)
        ours.add(q, norm_q, targets, counts)
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        positions += p.shape[0]
        gap = torch.sub(p, q, out=q)
        weight = p.sub_(norm_p[:, None]).exp_()
        divergences.append(torch.einsum("tv,tv->t", weight, gap) - norm_p + norm_q)
    kl = torch.cat(divergences).double()
    if not torch.isfinite(kl).all():
        raise NumericsError(f"{where}: the logits are not finite; the model is broken: see the report's layer losses")
    ordered = kl.sort().values
    return theirs, ours, {
        "kl_mean": float(kl.mean()),
        "kl_median": float(ordered[len(ordered) // 2]),
        "kl_p99": float(ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)) - 1)]),
        "kl_max": float(ordered[-1]),
        "top1_agreement": agreed / positions,
        "positions": float(positions),
    }  # fmt: skip


def _chunks(windows: Windows, hidden: HiddenStates, vocab_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(hidden states [1, tokens, hidden], targets [tokens], counts [tokens]) over all windows in order."""
    step = max(MIN_CHUNK_TOKENS, LOGIT_BYTES // (4 * vocab_size))
    following, counts = windows.targets()
    first = 0
    for batch in range(len(hidden)):
        normed = hidden[batch].flatten(0, 1)
        rows = hidden.shapes[batch][0]
        targets, counted = following[first : first + rows].flatten(), counts[first : first + rows].flatten()
        first += rows
        for begin in range(0, len(normed), step):
            end = begin + step
            yield normed[None, begin:end], targets[begin:end], counted[begin:end]
