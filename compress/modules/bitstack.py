"""A linear as a stack of sign planes and magnitudes: the tensors of `bitstack_spec`, no others."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.kernels.sign_planes import rebuilt, sign_planes_linear
from compress.modules.base import CompressedModule
from compress.modules.bitstack_spec import BitStackSpec, block_name
from compress.modules.spec import ModuleSpec


class SignBlock(nn.Module):
    """One block: signs uint8 [out, ceil(in / 8)], left float16 [out, rank], right float16 [in, rank]."""

    signs: Tensor
    left: Tensor
    right: Tensor

    def __init__(self, signs: Tensor, left: Tensor, right: Tensor):
        super().__init__()
        for name, tensor in (("signs", signs), ("left", left), ("right", right)):
            self.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return super()._apply(_keeping_dtype(fn), recurse)


class BitStackLinear(CompressedModule):
    """x @ weight.T + bias, over as many blocks as there are. Also stands in for a GPT-2 Conv1D, whose weight is the transpose.

    Signs and factors stay in uint8 and float16, whatever dtype the model is taken to: they are what is stored. Blocks come
    and go at the end of the stack; whoever changes them sees to it that no forward runs meanwhile
    (`checkpoint.resize` does), and what the last forward used stays alive until it returns.
    """

    spec: BitStackSpec
    scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        spec: BitStackSpec,
        blocks: Iterable[tuple[Tensor, Tensor, Tensor]],
        scale: Tensor | None = None,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        """`blocks`: signs, left and right of each, as many as the spec has. `dtype`: of the weight it stands for."""
        super().__init__()
        self.spec = spec.first(0)
        self.in_features, self.out_features = spec.in_features, spec.out_features
        self.dtype = dtype
        for name, tensor in (("scale", scale), ("bias", bias)):
            kept = None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
            self.register_parameter(name, kept)
        for block in blocks:
            self.append_block(*block)
        assert self.spec == spec and (scale is not None) == spec.scaled, (self.spec, spec)

    @classmethod
    def from_spec(
        cls, spec: ModuleSpec, bias: bool, dtype: torch.dtype, device: torch.device | str = "meta"
    ) -> BitStackLinear:
        assert isinstance(spec, BitStackSpec)
        dtypes = {"U8": torch.uint8, "F16": torch.float16}
        blocks = [
            tuple(
                torch.empty(shape, dtype=dtypes[kind], device=device) for kind, shape in spec.block_tensors().values()
            )
            for _ in range(spec.blocks)
        ]
        scale = torch.empty(spec.in_features, dtype=torch.float16, device=device) if spec.scaled else None
        empty = torch.empty(spec.out_features, dtype=dtype, device=device) if bias else None
        return cls(spec, blocks, scale, empty, dtype)  # type: ignore[arg-type]

    @property
    def n_blocks(self) -> int:
        return self.spec.blocks

    @property
    def blocks(self) -> list[SignBlock]:
        """The blocks, the largest part first."""
        return [self.get_submodule(block_name(i)) for i in range(self.n_blocks)]  # type: ignore[misc]

    def append_block(self, signs: Tensor, left: Tensor, right: Tensor) -> None:
        """Put a block on the stack; the tensors are taken over, not copied."""
        found = tuple((tensor.dtype, tuple(tensor.shape)) for tensor in (signs, left, right))
        kinds = (torch.uint8, torch.float16, torch.float16)
        shapes = tuple(shape for _, shape in self.spec.block_tensors().values())
        assert found == tuple(zip(kinds, shapes, strict=True)), found
        self.release()
        self.add_module(block_name(self.n_blocks), SignBlock(signs, left, right).train(self.training))
        self.spec = self.spec.first(self.n_blocks + 1)

    def drop_block(self) -> None:
        """Take the last block off; the first one stays."""
        assert self.n_blocks > 1, "a module has one block at least"
        self.release()
        self.spec = self.spec.first(self.n_blocks - 1)
        delattr(self, block_name(self.n_blocks))

    def scale_rows(self, scale: Tensor) -> None:
        for block in self.blocks:
            block.left.data = (block.left.data.float() * scale[:, None].to(block.left.device)).to(block.left.dtype)
        if self.bias is not None:
            self.bias.data = self.bias.data * scale.to(self.bias.device, self.bias.dtype)
        self.release()

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight of the blocks that are there, summed in float32 and rounded once."""
        spec = self.spec
        signs, left, right = self._parts()
        weight = torch.empty(spec.out_features, spec.in_features, dtype=dtype or self.dtype, device=signs[0].device)
        for rows, tile in rebuilt(signs, left, right, self.scale, spec.in_features):
            weight[rows] = tile
        return weight

    def forward(self, x: Tensor) -> Tensor:
        if self.held is not None:
            return functional.linear(x, self.held.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        return sign_planes_linear(x, *self._parts(), self.scale, self.bias, self.spec.in_features)

    def extra_repr(self) -> str:
        spec = self.spec
        plural = "block" if spec.blocks == 1 else "blocks"
        return f"{spec.in_features} -> {spec.out_features}, {spec.blocks} {plural} of rank {spec.rank}"

    def _parts(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        blocks = self.blocks
        return [b.signs for b in blocks], [b.left for b in blocks], [b.right for b in blocks]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.block_0.signs.device)).dtype  # type: ignore[union-attr,arg-type]
        scale = None if self.scale is None else self.scale.data  # the parameter is changed in place
        super()._apply(fn, recurse)
        if scale is not None:
            self.scale = nn.Parameter(_keeping_dtype(fn)(scale), requires_grad=False)
        return self


def _keeping_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn`, which moves tensors or casts them, without the cast."""

    def moved(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return fn(tensor)
        return fn(tensor.reshape(-1).view(torch.uint8)).view(tensor.dtype).view(tensor.shape)

    return moved
