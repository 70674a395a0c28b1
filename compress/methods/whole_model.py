"""The loss of a whole model and its gradients, for methods that look at it before the run.

Each block is run again in the backward pass, so of all of them but one only the hidden states between are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from compress.methods.base import Extent

IGNORED = -100  # a token whose loss is not counted
SAVED_HIDDEN = 16  # activations of one block that its backward pass needs, beside what a method adds, in hidden states
FRAGMENTATION = 2.0  # what the allocator holds over what is alive, measured on a CPU
LOGIT_COPIES = 4  # logits, their log-probabilities and the gradients of both


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, for `ids` [rows, length]. The last one has none; left out that way, logits are
    not copied."""
    ids = ids.to(next(model.parameters()).device)
    following = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], dim=1)
    logits = model(input_ids=ids, use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), following.flatten(), ignore_index=IGNORED)


def run_again(blocks: Sequence[nn.Module]) -> None:
    """From now on nothing but the inputs of each block is kept for the backward pass."""
    for block in blocks:
        block.forward = _run_again(block.forward)  # type: ignore[method-assign]


def run_once(blocks: Sequence[nn.Module]) -> None:
    """Undoes `run_again`; without it, the model would hold itself through its blocks' forwards."""
    for block in blocks:
        del block.forward


def backward_bytes(extent: Extent, held: int) -> int:
    """Peak bytes of a backward pass over a batch, without the model: a hidden state per block, and the larger of the logits
    and of one block's activations. `held`: numbers that the method adds to those."""
    hidden = extent.n_blocks * extent.batch_tokens * extent.hidden_size
    block = held + SAVED_HIDDEN * extent.batch_tokens * extent.hidden_size
    logits = LOGIT_COPIES * extent.batch_tokens * extent.vocab_size
    return 4 * int(FRAGMENTATION * (hidden + max(block, logits)))


def _run_again(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
