"""A linear whose weight is a product of some of its columns, a small matrix, and some of its rows. All three are leaves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.linalg.low_rank import refitted_left
from compress.modules.base import CompressedModule, Leaf
from compress.modules.cur_spec import FACTORS, CURSpec
from compress.modules.registry import module_class
from compress.modules.spec import ModuleSpec

REFIT_DAMPING = 1e-6  # of the mean of the diagonal: enough to solve, too little to hold the factor back


class CURLinear(CompressedModule):
    """x rows^T link^T columns^T + bias. Also stands in for a GPT-2 Conv1D, whose weight is the transpose.

    `rows`, `link`, `columns` are linears without bias: nn.Linear, or a compressed module.
    """

    spec: CURSpec
    rows: nn.Module
    link: nn.Module
    columns: nn.Module
    bias: Tensor | None

    def __init__(self, spec: CURSpec, rows: nn.Module, link: nn.Module, columns: nn.Module, bias: Tensor | None = None):
        super().__init__()
        self.spec = spec
        self.in_features, self.out_features = spec.in_features, spec.out_features
        self.rows, self.link, self.columns = rows, link, columns
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @classmethod
    def from_spec(
        cls, spec: ModuleSpec, bias: bool, dtype: torch.dtype, device: torch.device | str = "meta"
    ) -> CURLinear:
        assert isinstance(spec, CURSpec)
        made: dict[str, nn.Module] = {}
        for name, shape in spec.leaf_shapes().items():
            inside = spec.factor(name)
            if inside is None:
                made[name] = _linear(torch.empty(shape, dtype=dtype, device=device))
            else:
                made[name] = module_class(inside.representation).from_spec(inside, False, dtype, device)
        return cls(spec, **made, bias=torch.empty(spec.out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def from_factors(cls, columns: Tensor, link: Tensor, rows: Tensor, bias: Tensor | None = None) -> CURLinear:
        """columns [out, rank], link [rank, rank], rows [rank, in], in the dtype in which they are stored."""
        assert columns.shape[1] == link.shape[0] and link.shape[1] == rows.shape[0] == columns.shape[1]
        spec = CURSpec(rows.shape[1], columns.shape[0], len(link))
        spec.validate()
        return cls(spec, _linear(rows), _linear(link), _linear(columns), bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.columns(self.link(self.rows(x)))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """columns @ (link @ rows), multiplied in float32 and rounded once."""
        return (_weight(self.columns) @ self._to_link()).to(dtype or self._float_dtype())

    def leaves(self) -> dict[str, Leaf]:
        rows = _weight(self.rows)
        return {
            "rows": Leaf(rows),
            "link": Leaf(_weight(self.link), rows),
            "columns": Leaf(_weight(self.columns), self._to_link()),
        }

    def with_leaf(self, name: str, module: CompressedModule, second_moment: Tensor | None) -> CURLinear:
        """Changed rows refit the link, a changed link the columns, unless those are compressed already.

        The link that is best behind changed rows is so whatever the columns are, if they are independent. Columns fitted
        anew are no longer columns of the weight; they would not be either once rounded.
        """
        assert name in FACTORS, name
        spec = self.spec.with_leaf(name, module.spec)
        changed = module.dense(torch.float32)
        rows, link, columns = self.rows, self.link, self.columns
        if name == "rows":
            if isinstance(link, nn.Linear):
                link = _refitted(link, _weight(rows), changed, second_moment)
            rows = module
        elif name == "link":
            if isinstance(columns, nn.Linear):
                columns = _refitted(columns, self._to_link(), changed @ _weight(rows), second_moment)
            link = module
        else:
            columns = module
        return CURLinear(spec, rows, link, columns, self.bias)

    def hold(self, dtype: torch.dtype) -> None:
        """Compressed factors keep dense copies; the product is never formed, since it would cost more than it saves."""
        for factor in (self.rows, self.link, self.columns):
            if isinstance(factor, CompressedModule):
                factor.hold(dtype)

    def release(self) -> None:
        for factor in (self.rows, self.link, self.columns):
            if isinstance(factor, CompressedModule):
                factor.release()

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, rank {self.spec.rank}"

    def _to_link(self) -> Tensor:
        """link @ rows [rank, in] in float32: what leads from the inputs to those of the columns."""
        return _weight(self.link) @ _weight(self.rows)

    def _float_dtype(self) -> torch.dtype:
        return next(t.dtype for t in self.columns.state_dict().values() if t.is_floating_point())


def _refitted(factor: nn.Linear, before: Tensor, changed: Tensor, second_moment: Tensor | None) -> nn.Linear:
    """`factor`, fitted anew to `changed` [rank, in] in the place of `before` as what precedes it."""
    fitted = refitted_left(_weight(factor), before, changed, second_moment, REFIT_DAMPING)
    return _linear(fitted.to(factor.weight.dtype))


def _linear(weight: Tensor) -> nn.Linear:
    """A linear without bias that holds `weight` as it is."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    return linear


def _weight(factor: nn.Module) -> Tensor:
    """The weight of a factor in float32."""
    if isinstance(factor, CompressedModule):
        return factor.dense(torch.float32)
    return factor.get_parameter("weight").detach().float()
