"""A pruned linear between two block-diagonal ones: the tensors of `armor_spec`, no others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.linalg.block_diagonal import block_dense, block_left, block_linear, block_right
from compress.linalg.low_rank import refitted_left
from compress.modules.armor_spec import LEAF, ArmorSpec
from compress.modules.base import CompressedModule, Leaf
from compress.modules.sparse import SparseLinear
from compress.modules.spec import ModuleSpec

REFIT_DAMPING = 1e-6  # of the mean of the diagonal: enough to solve, too little to hold the wrapper back


class ArmorLinear(CompressedModule):
    """x times the transposes of diag(input_wrapper), core and diag(output_wrapper), one after the other, + bias. The product of
    the three is never formed. Also stands in for a GPT-2 Conv1D, whose weight is the transpose."""

    spec: ArmorSpec
    core: SparseLinear
    input_wrapper: Tensor
    output_wrapper: Tensor
    bias: Tensor | None

    def __init__(
        self,
        spec: ArmorSpec,
        output_wrapper: Tensor,
        core: SparseLinear,
        input_wrapper: Tensor,
        bias: Tensor | None = None,
    ):
        super().__init__()
        self.spec = spec
        self.in_features, self.out_features = spec.in_features, spec.out_features
        self.input_wrapper = nn.Parameter(input_wrapper.detach(), requires_grad=False)
        self.core = core
        self.output_wrapper = nn.Parameter(output_wrapper.detach(), requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @classmethod
    def from_spec(
        cls, spec: ModuleSpec, bias: bool, dtype: torch.dtype, device: torch.device | str = "meta"
    ) -> ArmorLinear:
        assert isinstance(spec, ArmorSpec)
        shapes = spec.tensors("F32")
        output_wrapper, input_wrapper = (
            torch.empty(shapes[name][1], dtype=dtype, device=device) for name in ("output_wrapper", "input_wrapper")
        )
        core = SparseLinear.from_spec(spec.core, False, dtype, device)
        assert isinstance(core, SparseLinear)
        empty = torch.empty(spec.out_features, dtype=dtype, device=device) if bias else None
        return cls(spec, output_wrapper, core, input_wrapper, empty)

    @classmethod
    def from_parts(
        cls, output_wrapper: Tensor, core: SparseLinear, input_wrapper: Tensor, bias: Tensor | None = None
    ) -> ArmorLinear:
        """output_wrapper [out/a, a, a] and input_wrapper [in/b, b, b], as they are stored; a core without bias."""
        out_features, in_features = core.out_features, core.in_features
        spec = ArmorSpec(in_features, out_features, output_wrapper.shape[-1], input_wrapper.shape[-1], core.spec)
        spec.validate()
        return cls(spec, output_wrapper, core, input_wrapper, bias)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """diag(output_wrapper) @ core @ diag(input_wrapper), multiplied in float32 and rounded once."""
        return block_left(self.output_wrapper.float(), self._inner()).to(dtype or self.output_wrapper.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = block_linear(self.core(block_linear(x, self.input_wrapper)), self.output_wrapper)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def hold(self, dtype: torch.dtype) -> None:
        """The core keeps a dense copy."""
        self.core.hold(dtype)

    def release(self) -> None:
        self.core.release()

    def leaves(self) -> dict[str, Leaf]:
        """The core under its mask. Wrappers stay as they are."""
        core = self.core.leaves()[""]
        return {LEAF: Leaf(core.weight, block_dense(self.input_wrapper.float()), core.mask)}

    def with_leaf(self, name: str, module: CompressedModule, second_moment: Tensor | None) -> ArmorLinear:
        """A changed core refits the output wrapper, block by block."""
        assert name == LEAF, name
        core = self.core.with_leaf("", module, None)
        before, wrapper = self._inner(), self.output_wrapper
        after = block_right(core.dense(torch.float32), self.input_wrapper.float())
        size = self.spec.output_size
        fitted = [
            refitted_left(block, before[rows], after[rows], second_moment, REFIT_DAMPING)
            for block, rows in ((block, slice(i * size, (i + 1) * size)) for i, block in enumerate(wrapper.float()))
        ]
        return ArmorLinear.from_parts(torch.stack(fitted).to(wrapper.dtype), core, self.input_wrapper, self.bias)

    def extra_repr(self) -> str:
        spec = self.spec
        return f"{spec.in_features} -> {spec.out_features}, blocks of {spec.input_size} and {spec.output_size}"

    def _inner(self) -> Tensor:
        """core @ diag(input_wrapper) [out, in] in float32."""
        return block_right(self.core.dense(torch.float32), self.input_wrapper.float())
