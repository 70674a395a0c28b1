"""SliceGPT as projections: the original model, whole, with P = Q Q^T in front of every norm. Slow and short.

Q of norm k is PCA of what enters it, the projections before already in place: one forward of all tokens for each norm.
LayerNorm models get their mean taken out where the stream is written.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from compress.calibration.data import load_tokenizer, load_tokens
from compress.checkpoint.headers import read_headers, read_json
from compress.models.families import architecture_of, module_name
from compress.models.stream import stream_of
from compress.recipe import Recipe


def sliced_logits(folder: Path, recipe: Recipe, width: int) -> tuple[Tensor, Tensor, list[float]]:
    """(calibration tokens, the sliced model's logits for them, the share of energy that each norm's projection leaves out).

    For other tokens the function is not settled: calibration may leave fewer directions than `width` that anything reaches.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").double().eval()
    config = read_json(folder / "config.json")
    architecture = architecture_of(config, read_headers(folder))
    stream = stream_of(architecture)
    names = [branch.norm for branches in stream.branches for branch in branches]
    tokens = load_tokens(recipe.calibration, load_tokenizer(folder), vocab_size=model.config.vocab_size).rows
    projections: dict[str, Tensor] = {}
    last = width if stream.one_width else stream.size

    def projected(name: str, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if stream.layer_norm else x
        return x @ projections[name] if name in projections else x

    # the residual is what enters the norm: a block's own norms are asked for it by a rewritten forward
    for index, branches in enumerate(stream.branches):
        _project_block(model, architecture, index, [b.norm for b in branches], projected)
    final = model.get_submodule(module_name(architecture, stream.final_norm))
    final.register_forward_pre_hook(lambda m, a: (projected(stream.final_norm, a[0]), *a[1:]))

    lost = []
    for name in [*names, stream.final_norm]:
        moment = torch.zeros(stream.size, stream.size, dtype=torch.float64)
        seen: list[Tensor] = []

        def look(module: nn.Module, args: tuple[Tensor, ...], seen: list[Tensor] = seen) -> None:
            seen.append(args[0])

        hook = model.get_submodule(module_name(architecture, name)).register_forward_pre_hook(look)
        with torch.no_grad():
            for row in tokens:
                model(row[None], use_cache=False)
                x = seen.pop().flatten(0, -2)
                moment += x.T @ x
        hook.remove()
        d = last if name == stream.final_norm else width
        values, vectors = torch.linalg.eigh(moment)
        directions = vectors[:, stream.size - d :]
        projections[name] = directions @ directions.T
        lost.append(float(values[: stream.size - d].sum() / values.sum()))
    with torch.no_grad():
        return torch.stack(tokens), model(torch.stack(tokens), use_cache=False).logits.float(), lost


def _project_block(model: nn.Module, architecture, index: int, norms: list[str], projected) -> None:
    """h = P x + attention(norm(P x)), y = P' h + mlp(norm(P' h)), by hooks of the norms and of the block.

    A block computes x + attention(norm(x)) by itself; its input is projected before, and so is what enters the second norm,
    whose part that is cut off, h - P' h, is taken from the output.
    """
    block = model.get_submodule(module_name(architecture, architecture.blocks[index]))
    second = model.get_submodule(module_name(architecture, norms[1]))
    cut: list[Tensor] = []

    def enter(module: nn.Module, args: tuple, kwargs: dict):
        return (projected(norms[0], args[0]), *args[1:]), kwargs

    def middle(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        h = args[0]
        inside = projected(norms[1], h)
        cut.append((h - inside).view_as(h))
        return (inside, *args[1:])

    def leave(module: nn.Module, args: tuple, output):
        gone = cut.pop()
        if isinstance(output, tuple):
            return (output[0] - gone.view_as(output[0]), *output[1:])
        return output - gone.view_as(output)

    block.register_forward_pre_hook(enter, with_kwargs=True)
    second.register_forward_pre_hook(middle)
    block.register_forward_hook(leave)
