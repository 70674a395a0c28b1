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

from compress.errors import NumericsError
from compress.methods.base import Extent, View

SKETCH_ROWS = 128  # per layer: a direction's mean square is known to about an eighth, its neighbours' independently
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


def gradient_sketches(view: View, names: Sequence[str], n_tokens: int) -> dict[str, Tensor]:
    """Of each layer a sketch S [SKETCH_ROWS, out] of its outputs' gradients: |S u|^2 is the mean over tokens of (g_t . u)^2.

    g_t is the gradient of the summed log-likelihood of a batch by the layer's output for token t, of the original model; u is
    any direction. Every g_t goes, with a random sign, into a random row, so that products of different tokens cancel on
    average: an unbiased estimate for all directions at once, where the moment itself would be [out, out]. 0 where no token came.

    Args:
        n_tokens: batches are taken until they hold so many.
    """
    model, generator = view.model(), view.generator("gradients")
    sketches: dict[str, Tensor] = {}
    counts = dict.fromkeys(names, 0)

    def watch(name: str, out_features: int) -> Callable[..., None]:
        def see(gradient: Tensor) -> None:
            rows = gradient.flatten(0, -2).float()  # [tokens, out]
            row = torch.randint(SKETCH_ROWS, (len(rows),), generator=generator)
            sign = torch.randint(2, (len(rows), 1), generator=generator) * 2.0 - 1
            sketches[name].index_add_(0, row.to(rows.device), rows * sign.to(rows))
            counts[name] += len(rows)

        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(see)

        device = next(model.parameters()).device
        sketches[name] = torch.zeros(SKETCH_ROWS, out_features, device=device)
        return hook

    def follow(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        (args[0] if args else kwargs["hidden_states"]).requires_grad_()

    hooks = []
    for name in names:
        parent, attribute = view.place(model, name)
        hooks.append(getattr(parent, attribute).register_forward_hook(watch(name, view.shapes[name].out_features)))
    blocks = view.block_modules(model)
    hooks.append(blocks[0].register_forward_pre_hook(follow, with_kwargs=True))
    run_again(blocks)
    batches = _first(view.batches, n_tokens)
    try:
        with torch.enable_grad(), view.track("gradients", len(batches), "batch") as advance:
            for ids in batches:
                loss = next_token_loss(model, ids)
                if not torch.isfinite(loss):
                    raise NumericsError("the loss of the calibration rows is not a number; check the checkpoint")
                (loss * (ids.numel() - len(ids))).backward()
                advance(f"loss {float(loss.detach()):.4f}")
    finally:
        run_once(blocks)
        for handle in hooks:
            handle.remove()
    for name, sketch in sketches.items():
        if not torch.isfinite(sketch).all():
            raise NumericsError(f"{name}: the gradient of the loss by its outputs holds NaN or infinity")
    return {name: sketch / max(counts[name], 1) ** 0.5 for name, sketch in sketches.items()}


def _first(batches: Sequence[Tensor], n_tokens: int) -> list[Tensor]:
    """The batches that hold the first `n_tokens` tokens, at least one."""
    chosen: list[Tensor] = []
    for ids in batches:
        if sum(other.numel() for other in chosen) >= n_tokens:
            break
        chosen.append(ids)
    return chosen


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
