"""Functions of the public SVD-LLM and ASVD code, run as they stand in a checkout.

SVD-LLM's are read out of `SVDLLM.py` one by one: the file imports modules that need an older transformers. What they put factors
into is replaced by plain linears, and `.cuda()` by nothing; the arithmetic is theirs to the letter.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

Factors = tuple[Tensor, Tensor]  # left [out, rank], right [rank, in]
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


class Slots(nn.Module):
    """In place of SVD-LLM's attention and MLP: a linear for each factor, whose weight they replace."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        for name in LINEARS:
            for side in "uv":
                self.add_module(f"{name}_{side}_proj", nn.Linear(1, 1, bias=False))


class SVDLLM:
    """The functions of a checkout of SVD-LLM."""

    def __init__(self, folder: Path):
        self._names: dict[str, Any] = {"torch": torch, "nn": nn, "tqdm": lambda items: items}
        self._names |= {"SVD_LlamaAttention": Slots, "SVD_LlamaMLP": Slots}
        _define(folder / "utils" / "model_utils.py", {"find_layers"}, self._names)
        _define(folder / "SVDLLM.py", {"profle_svdllm", "whitening", "local_update"}, self._names)

    def profile(self, model: nn.Module, batches: list[Tensor]) -> dict[int, dict[str, Tensor]]:
        """Block -> linear -> S with S S^T = H, the Cholesky factor in float64, of the inputs that `batches` give."""
        return _quietly(self._names["profle_svdllm"], "llama", model, [{"input_ids": ids} for ids in batches], "cpu")

    def whitened(self, model: nn.Module, profile: dict[int, dict[str, Tensor]], keep: float) -> dict[str, Factors]:
        """Layer -> factors of the whitened truncation. The linears of `model` are gone then."""
        _quietly(self._names["whitening"], "llama", model, profile, keep, "cpu")
        found = {}
        for i, block in enumerate(model.model.layers):  # type: ignore[union-attr, arg-type]
            for place, slots in (("self_attn", block.self_attn), ("mlp", block.mlp)):
                for name in LINEARS[:4] if place == "self_attn" else LINEARS[4:]:
                    left, right = (getattr(slots, f"{name}_{side}_proj").weight.detach() for side in "uv")
                    found[f"model.layers.{i}.{place}.{name}_proj"] = (left, right)
        return found

    def updated(self, linear: nn.Linear, root: Tensor, keep: float, direct: bool = False) -> Factors:
        """Factors of the truncation, whitened or (`direct`) plain, whose left one is then fitted to the outputs.

        The inputs that it is fitted on are the columns of S = `root`: as many as there are inputs, with the same second moment.
        """
        with mock.patch.object(Tensor, "cuda", lambda self: self), torch.no_grad():
            update = _quietly(self._names["local_update"], linear, root.clone(), keep, "", direct_update=direct)
            inputs = root.T.float()[None]
            update.add_batch_update_u(inputs, inputs @ linear.weight.T)
            return update.fasterprune()


def asvd(folder: Path) -> Callable[[nn.Linear, Tensor, float, float], Factors]:
    """(linear, mean |x| of each input, keep_ratio, alpha) -> factors, by a checkout of ASVD4LLM."""
    spec = importlib.util.spec_from_file_location("asvd_svd_linear", folder / "modules" / "svd_linear.py")
    assert spec is not None and spec.loader is not None, folder
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def factors(linear: nn.Linear, size: Tensor, keep: float, alpha: float) -> Factors:
        torch.manual_seed(0)  # they take randomised singular vectors
        linear.scaling_diag_matrix = size.clone()  # type: ignore[assignment]
        made = module.SVDLinear.from_linear(linear, keep, act_aware=True, alpha=alpha)
        return made.ALinear.weight.detach(), made.BLinear.weight.detach()

    return factors


def _define(file: Path, wanted: set[str], names: dict[str, Any]) -> None:
    """Run the definitions of `wanted` in `file`, and nothing else of it, in `names`."""
    tree = ast.parse(file.read_text())
    tree.body = [part for part in tree.body if getattr(part, "name", None) in wanted]
    missing = wanted - {part.name for part in tree.body}  # type: ignore[attr-defined]
    if missing:
        raise SystemExit(f"{file} has no {', '.join(sorted(missing))}: not the version this was written for (1c1009a)")
    exec(compile(tree, str(file), "exec"), names)


def _quietly(work: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return work(*arguments, **named)
