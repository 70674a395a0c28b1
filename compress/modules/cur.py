"""A linear whose weight is a product of some of its columns, a small matrix, and some of its rows. All three are leaves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.linalg.low_rank import refitted_left
from compress.modules.base import CompressedModule, Leaf
from compress.modules.cur_spec import CURSpec
from compress.modules.factored import FactoredLinear, leaf_of, linear_with, replaced, weight_of

REFIT_DAMPING = 1e-6  # of the mean of the diagonal: enough to solve, too little to hold the factor back


class CURLinear(FactoredLinear):
    """x rows^T link^T columns^T + bias. Also stands in for a GPT-2 Conv1D, whose weight is the transpose.

    `rows`, `link`, `columns` are linears without bias: nn.Linear, or a compressed module.
    """

    spec: CURSpec
    rows: nn.Module
    link: nn.Module
    columns: nn.Module

    @classmethod
    def from_factors(cls, columns: Tensor, link: Tensor, rows: Tensor, bias: Tensor | None = None) -> CURLinear:
        """columns [out, rank], link [rank, rank], rows [rank, in], in the dtype in which they are stored."""
        assert columns.shape[1] == link.shape[0] and link.shape[1] == rows.shape[0] == columns.shape[1]
        spec = CURSpec(rows.shape[1], columns.shape[0], len(link))
        spec.validate()
        return cls(spec, linear_with(rows), linear_with(link), linear_with(columns), bias=bias)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """columns @ (link @ rows), multiplied in float32 and rounded once."""
        return (weight_of(self.columns) @ self._to_link()).to(dtype or self._float_dtype())

    def leaves(self) -> dict[str, Leaf]:
        rows = leaf_of(self.rows)
        return {
            "rows": rows,
            "link": leaf_of(self.link, rows.weight),
            "columns": leaf_of(self.columns, self._to_link()),
        }

    def with_leaf(self, name: str, module: CompressedModule, second_moment: Tensor | None) -> CURLinear:
        """Changed rows refit the link, a changed link the columns, unless those are compressed already.

        The link that is best behind changed rows is so whatever the columns are, if they are independent. Columns fitted
        anew are no longer columns of the weight; they would not be either once rounded.
        """
        assert name in self.spec.factors, name
        spec = self.spec.with_leaf(name, module.spec)
        changed = module.dense(torch.float32)
        rows, link, columns = self.rows, self.link, self.columns
        if name == "rows":
            if isinstance(link, nn.Linear):
                link = _refitted(link, weight_of(rows), changed, second_moment)
            rows = replaced(rows, module)
        elif name == "link":
            if isinstance(columns, nn.Linear):
                columns = _refitted(columns, self._to_link(), changed @ weight_of(rows), second_moment)
            link = replaced(link, module)
        else:
            columns = replaced(columns, module)
        return CURLinear(spec, rows, link, columns, bias=self.bias)

    def _to_link(self) -> Tensor:
        """link @ rows [rank, in] in float32: what leads from the inputs to those of the columns."""
        return weight_of(self.link) @ weight_of(self.rows)


def _refitted(factor: nn.Linear, before: Tensor, changed: Tensor, second_moment: Tensor | None) -> nn.Linear:
    """`factor`, fitted anew to `changed` [rank, in] in the place of `before` as what precedes it."""
    fitted = refitted_left(weight_of(factor), before, changed, second_moment, REFIT_DAMPING)
    return linear_with(fitted.to(factor.weight.dtype))
