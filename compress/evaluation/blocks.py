"""How far a compressed model's hidden states are from the original's, block by block: where the loss comes from.

Let y_t be what block i gives out for token t in the original, z_t in the compressed model:

    relative error   mean_t |z_t - y_t| / |y_t|
    cosine           mean_t <z_t, y_t> / (|z_t| |y_t|)

    accumulated      every model on its own stream: z has the errors of all blocks up to i in it
    local            the compressed block on the original's input, over a sample of tokens: what this block alone does

Means over tokens, not norms of the whole matrix: a few tokens have states a thousand times larger than all others (Sun et
al., 2024, "Massive activations", arXiv:2402.17762), and a common norm would hardly show anything else.

The two models go block by block in step, so that a block of each and the two sets of hidden states are all that is held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compress.calibration.store import HiddenStates
from compress.checkpoint.stream import StreamedModel

LOCAL_TOKENS = 8192  # about so many show a block's own error; its mean over them is known to a per cent or so
TINY = torch.finfo(torch.float32).tiny  # of a token whose state is zero


@dataclass
class Distance:
    """Relative error and cosine, over all tokens that were added."""

    error: float = 0.0
    cosine: float = 0.0
    n_tokens: int = 0

    def add(self, found: Tensor, true: Tensor) -> None:
        """`found` and `true`: hidden states [batch, length, hidden_size] of the same tokens."""
        found, true = found.float().flatten(0, 1), true.float().flatten(0, 1)
        ours, theirs, both = (
            torch.linalg.vecdot(a, b).double() for a, b in ((found, found), (true, true), (found, true))
        )
        gap = found - true
        squared = torch.linalg.vecdot(gap, gap).double()
        self.error += float((squared / theirs.clamp_min(TINY)).sqrt().sum())
        self.cosine += float(torch.where(squared == 0, 1.0, both / (ours * theirs).sqrt().clamp_min(TINY)).sum())
        self.n_tokens += len(gap)

    def to_dict(self, prefix: str = "") -> dict[str, float]:
        n = max(self.n_tokens, 1)
        return {f"{prefix}relative_error": self.error / n, f"{prefix}cosine": self.cosine / n}


@dataclass
class BlockErrors:
    """The distances of all blocks, as they are gone through."""

    accumulated: list[Distance] = field(default_factory=list)
    local: list[Distance] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON. "worst": the blocks by what each does by itself, most first."""
        rows: list[dict[str, Any]] = [
            {"block": index, **accumulated.to_dict(), **local.to_dict("local_")}
            for index, (accumulated, local) in enumerate(zip(self.accumulated, self.local, strict=True))
        ]
        worst = sorted(range(len(rows)), key=lambda index: -rows[index]["local_relative_error"])
        return {
            "reason": None,
            "tokens": self.accumulated[0].n_tokens if rows else 0,
            "local_tokens": self.local[0].n_tokens if rows else 0,
            "worst": worst,
            "blocks": rows,
        }


SAME_BASIS = 0.5  # cosine
OTHER_BASIS = "the hidden states of the two are in different bases (one of the models was rotated)"


def not_comparable(reason: str) -> dict[str, Any]:
    """What stands in the place of the distances where there are none."""
    return {"reason": reason, "tokens": 0, "local_tokens": 0, "worst": [], "blocks": []}


def obstacle(model: StreamedModel, reference: StreamedModel) -> str | None:
    """Why the hidden states of the two cannot be compared block by block; None if they can."""
    ours, theirs = model.architecture, reference.architecture
    for what, here, there in (
        ("are of different families", ours.family, theirs.family),
        ("have different numbers of blocks", ours.n_blocks, theirs.n_blocks),
        ("have hidden states of different width", ours.hidden_size, theirs.hidden_size),
    ):
        if here != there:
            return f"the models {what} ({here} and {there})"
    if ours.structure.width != theirs.structure.width:
        widths = (a.structure.width or a.hidden_size for a in (ours, theirs))
        return "every block of a sliced model has a basis of its own, of {} entries here and {} there".format(*widths)
    return None


def in_one_basis(ours: HiddenStates, theirs: HiddenStates) -> bool:
    """Whether what enters block 0 is the same but for rounding. A rotated model has the same outputs in another basis: there
    the cosine between the two is near 0, while rounding a table to 2 bits leaves it above 0.8."""
    if not len(ours):
        return True
    a, b = ours[0].double().flatten(), theirs[0].double().flatten()
    norms = float(a.norm() * b.norm())
    return norms == 0 or float(a @ b) > SAME_BASIS * norms


def run_in_step(
    model: StreamedModel,
    ours: HiddenStates,
    reference: StreamedModel,
    theirs: HiddenStates,
    advance: Callable[[], None],
) -> BlockErrors:
    """Bring the hidden states of both models, [batch, length, hidden_size] each, from the first block's input to the last
    block's output, and compare them after every block. Each block is loaded once."""
    errors = BlockErrors()
    sampled = sampled_rows(ours.shapes)
    for index in range(model.n_blocks):
        accumulated, local = Distance(), Distance()
        original, block = reference.load_block(index), model.load_block(index)
        for batch, n_rows in enumerate(sampled):
            entering = theirs[batch].to(reference.device)
            true = reference.call_block(original, index, entering)
            found = model.call_block(block, index, ours[batch].to(model.device))
            accumulated.add(found, true)
            if n_rows:
                local.add(model.call_block(block, index, entering[:n_rows]), true[:n_rows])
            theirs[batch], ours[batch] = true, found
        reference.unload_block(index)
        model.unload_block(index)
        errors.accumulated.append(accumulated)
        errors.local.append(local)
        advance()
    return errors


def sampled_rows(shapes: list[tuple[int, ...]], wanted_tokens: int = LOCAL_TOKENS) -> list[int]:
    """How many windows of each batch are sampled: about `wanted_tokens` in all, spread over the text.

    The first ones of a batch, and of every batch as many or none, so that few shapes of inputs occur.
    """
    n_windows = sum(shape[0] for shape in shapes)
    wanted = min(n_windows, max(1, -(-wanted_tokens // shapes[0][1])))
    each = max(1, round(wanted / len(shapes)))
    every = max(1, len(shapes) * each // wanted)
    return [min(each, shape[0]) if batch % every == 0 else 0 for batch, shape in enumerate(shapes)]
