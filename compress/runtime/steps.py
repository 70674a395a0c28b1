"""One token through the blocks of a packed model with a dozen calls a block in place of some seventy.

Of a small model's token the products are little more than half of the time; the rest is Python and torch around operations
on a few thousand numbers. Within `stepping` the blocks of families that are built as Llama is take a single token another
way: products write into buffers that are there, norms, rotary positions and the gate are one compiled call each, keys and
values go straight into the cache. The arithmetic is that of the modules, rounded where torch rounds; sums of a norm are
added in another order.

A block goes the usual way where anything is unusual: other classes, hooks, linears that are not packed, masks, several tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

from compress.kernels import native, token
from compress.kernels.packed import Product
from compress.modules.factored import FactoredLinear
from compress.modules.packed import PackedRows
from compress.modules.quantized import QuantizedLinear
from compress.runtime.cache import BufferedLayer

FAMILIES = ("Llama", "Mistral", "Qwen2")  # whose blocks compute what `Step` does, as transformers builds them


class Step:
    """A block's forward for one token."""

    def __init__(self, block: Any, buffers: Callable[[str, int, torch.dtype], Tensor]):
        """`buffers`: memory by name, width and dtype, shared by all blocks. Raises: _UnusualError."""
        attention, mlp = _children(block)
        self.norms: tuple[Any, Any] = (block.input_layernorm, block.post_attention_layernorm)
        self.dtype: torch.dtype = self.norms[0].weight.dtype
        if self.dtype not in native.DTYPES or self.norms[1].weight.dtype != self.dtype:
            raise _UnusualError
        self.layer, self.scale, self.head = attention.layer_idx, attention.scaling, attention.head_dim
        self.hidden = attention.q_proj.in_features
        self.n_heads, self.n_keys = (m.out_features // self.head for m in (attention.q_proj, attention.k_proj))

        def product(name: str, *linears: Any) -> Product | Factors:
            source = buffers(f"{name} of", linears[0].in_features, self.dtype)
            out = buffers(name, sum(linear.out_features for linear in linears), self.dtype)
            if any(isinstance(linear, FactoredLinear) for linear in linears):
                return Factors(linears, source, out, buffers)
            packed, bias = _joined(linears)
            return Product(packed.weight, bias, packed.mode, source, out)

        self.qkv = product("qkv", attention.q_proj, attention.k_proj, attention.v_proj)
        self.o = product("o", attention.o_proj)
        self.gate_up = product("gate_up", mlp.gate_proj, mlp.up_proj)
        self.down = product("down", mlp.down_proj)

    def takes(self, x: Tensor, mask: object, cache: Any, turning: Any) -> bool:
        """Whether it can compute this call."""
        if x.shape[:2] != (1, 1) or x.dtype != self.dtype or mask is not None or torch.compiler.is_compiling():
            return False
        layer = cache.layers[self.layer] if cache is not None and turning is not None else None
        room = isinstance(layer, BufferedLayer) and layer.room() is not None
        return room and x.is_contiguous() and all(t.is_contiguous() and t.dtype == self.dtype for t in turning)

    def __call__(self, x: Tensor, layer: BufferedLayer, turning: tuple[Tensor, Tensor]) -> Tensor:
        before, after = self.norms
        token.norm(x, before.weight, before.variance_epsilon, self.qkv.x)
        self.qkv()
        room = layer.room()
        assert room is not None
        keys, values, place = room
        token.turn(self.qkv.out.view(-1, self.head), *turning, keys, values, place)
        layer.filled(place + 1)
        rows = self.qkv.out[: self.n_heads * self.head].view(1, self.n_keys, -1, self.head)
        attended = functional.scaled_dot_product_attention(rows, layer.keys, layer.values, scale=self.scale)
        self.o.x.view(attended.shape).copy_(attended)
        x = x + self.o()
        token.norm(x, after.weight, after.variance_epsilon, self.gate_up.x)
        token.gated(self.gate_up(), self.down.x)
        return x + self.down()


class Factors:
    """Linears of one input, some of which are products of packed factors; these go one after the other, those between them
    are one product, each into its part of `out`."""

    def __init__(
        self, linears: tuple[Any, ...], x: Tensor, out: Tensor, buffers: Callable[[str, int, torch.dtype], Tensor]
    ):
        """Raises: _UnusualError."""
        self.x, self.out = x, out
        self.steps: list[Callable[[], object]] = []
        begin = 0
        for factored, run in groupby(linears, lambda linear: isinstance(linear, FactoredLinear)):
            neighbours = tuple(run)
            for members in [(linear,) for linear in neighbours] if factored else [neighbours]:
                width = sum(linear.out_features for linear in members)
                part, source = out[begin : begin + width], x
                begin += width
                chain = [(factor,) for factor in members[0].factors()] if factored else [members]
                for place, factors in enumerate(chain, 1):
                    packed, bias = _joined(factors)
                    last = place == len(chain)
                    to = part if last else buffers(f"factor {place}", packed.weight.layout.out_features, x.dtype)
                    self.steps.append(Product(packed.weight, bias, packed.mode, source, to))
                    source = to
                if factored and members[0].bias is not None:
                    self.steps.append(partial(part.add_, members[0].bias.detach().to(x.dtype)))

    def __call__(self) -> Tensor:
        for step in self.steps:
            step()
        return self.out


class _UnusualError(Exception):
    """The block goes the usual way."""


def _children(block: nn.Module) -> tuple[Any, Any]:
    """Attention and MLP of a block of a known family that nobody changed or listens to."""
    name = type(block).__name__.removesuffix("DecoderLayer")
    if name not in FAMILIES:
        raise _UnusualError
    home = f"transformers.models.{name.lower()}.modeling_{name.lower()}"
    children = {
        "self_attn": "Attention", "mlp": "MLP", "input_layernorm": "RMSNorm", "post_attention_layernorm": "RMSNorm",
    }  # fmt: skip
    found = {child: getattr(block, child, None) for child in children}
    kinds = {child: type(module) for child, module in found.items()}
    if any(kinds[c].__name__ != name + kind or kinds[c].__module__ != home for c, kind in children.items()):
        raise _UnusualError
    if type(block).__module__ != home or set(dict(block.named_children())) != set(children):
        raise _UnusualError
    for module in block.modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            raise _UnusualError
    if found["self_attn"].training or type(found["mlp"].act_fn) is not type(ACT2FN["silu"]):  # type: ignore[union-attr]
        raise _UnusualError
    return found["self_attn"], found["mlp"]


def _joined(linears: tuple[Any, ...]) -> tuple[PackedRows, Tensor | None]:
    """The one buffer of linears that together are all of it, in their order, and their biases end to end."""
    packed = linears[0].packed if isinstance(linears[0], QuantizedLinear) else None
    if packed is None or packed.weight.buffer.is_cuda or len(packed.rows) != len(linears):
        raise _UnusualError
    for place, linear in enumerate(linears):
        if not isinstance(linear, QuantizedLinear) or linear.packed is not packed or linear.place != place:
            raise _UnusualError
        if linear.held is not None:
            raise _UnusualError
    biases = [linear.bias for linear in linears]
    if all(bias is None for bias in biases):
        return packed, None
    if any(bias is None or bias.dtype not in native.DTYPES for bias in biases):
        raise _UnusualError
    return packed, torch.cat([bias.detach() for bias in biases])


@contextmanager
def stepping(model: nn.Module) -> Iterator[int]:
    """Within it blocks that can take single tokens through `Step`, in this thread. Gives the number of these blocks."""
    taken: list[nn.Module] = []
    memory: dict[tuple[str, int, torch.dtype], Tensor] = {}

    def buffers(name: str, width: int, dtype: torch.dtype) -> Tensor:
        return memory.setdefault((name, width, dtype), torch.empty(width, dtype=dtype))

    blocks = next((m for m in model.modules() if isinstance(m, nn.ModuleList)), ())
    try:
        for block in blocks if native.absent() is None else ():
            try:
                step = Step(block, buffers)
            except _UnusualError:
                continue
            block.forward = _stepped(step, block.forward, threading.get_ident())
            taken.append(block)
        yield len(taken)
    finally:
        for block in taken:
            del block.forward


def _stepped(step: Step, usual: Callable[..., Tensor], owner: int) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor, *others: Any, **named: Any) -> Tensor:
        cache, turning = named.get("past_key_values"), named.get("position_embeddings")
        mine = not others and threading.get_ident() == owner  # the buffers are this thread's
        if mine and step.takes(hidden_states, named.get("attention_mask"), cache, turning):
            return step(hidden_states, cache.layers[step.layer], turning)  # type: ignore[union-attr, arg-type]
        return usual(hidden_states, *others, **named)

    return forward
