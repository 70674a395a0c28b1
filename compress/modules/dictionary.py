"""A linear as a dictionary and sparse codes: the tensors of `dictionary_spec`, no others. Both are leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from compress.linalg.sparse_coding import fitted
from compress.modules.base import CompressedModule, Leaf
from compress.modules.dictionary_spec import CODES, LEAF, DictionarySpec
from compress.modules.factored import FactoredLinear, leaf_of, linear_with, replaced, weight_of
from compress.modules.registry import module_class
from compress.modules.sparse import SparseLinear
from compress.modules.spec import ModuleSpec

REFIT_STEPS = 60  # of conjugate gradients at most; a rounded dictionary is far from orthogonal
REFIT_DAMPING = 1e-3  # of the mean of diag(D H D^T): holds coefficients where they are that few inputs tell of


class DictionaryLinear(FactoredLinear):
    """x dictionary^T codes^T + bias: first by the atoms, then by the sparse codes; their product is never formed. Also stands in
    for a GPT-2 Conv1D, whose weight is the transpose.

    A dictionary that another module stores is no part of this one's state: it is lent (`lend`), one object there and here.
    """

    spec: DictionarySpec
    codes: nn.Module

    def __init__(self, spec: DictionarySpec, *factors: nn.Module, bias: Tensor | None = None):
        """`factors`: the dictionary, unless it is lent, and the codes."""
        CompressedModule.__init__(self)
        self.spec = spec
        self.in_features, self.out_features = spec.in_features, spec.out_features
        for name, factor in zip(spec.leaf_shapes(), factors, strict=True):
            self.add_module(name, factor)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @classmethod
    def from_parts(
        cls,
        dictionary: Tensor | nn.Module,
        codes: Tensor,
        mask: Tensor | None,
        bias: Tensor | None = None,
        shared: str | None = None,
    ) -> DictionaryLinear:
        """In the dtypes in which they are stored.

        Args:
            dictionary: [atoms, in]; or what `shared` lends.
            codes: [out, atoms].
            mask: bool [out, atoms], which coefficients are stored, equally many per row; None: all.
        """
        out_features, n_atoms = codes.shape
        lent = dictionary if isinstance(dictionary, nn.Module) else None
        own = linear_with(dictionary) if isinstance(dictionary, Tensor) else None
        in_features = _width(own or lent)
        n_kept = n_atoms if mask is None else int(mask[0].sum())
        spec = DictionarySpec.of_sizes(in_features, out_features, n_atoms, n_kept, shared)
        if lent is not None:
            spec = replace(spec, dictionary=lent.spec if isinstance(lent, CompressedModule) else None)
        spec.validate()
        coded = linear_with(codes) if mask is None else SparseLinear.from_weight(codes, mask, n_kept, n_atoms)
        if own is not None:
            return cls(spec, own, coded, bias=bias)
        assert lent is not None and shared is not None
        module = cls(spec, coded, bias=bias)
        module.lent = (lent,)
        return module

    @property
    def atoms(self) -> nn.Module:
        """The linear [atoms, in], its own or the lent one."""
        return self.lent[0] if self.lent else self.get_submodule(LEAF)

    def factors(self) -> list[nn.Module]:
        return [*self.lent, *(self.get_submodule(name) for name in self.spec.leaf_shapes())]

    @classmethod
    def part_to_lend(cls, spec: ModuleSpec, dtype: torch.dtype) -> nn.Module:
        assert isinstance(spec, DictionarySpec)
        inside = spec.dictionary
        if inside is None:
            part: nn.Module = linear_with(torch.empty(spec.factor_shapes()[LEAF], dtype=dtype, device="meta"))
        else:
            part = module_class(inside.representation).from_spec(inside, False, dtype, "meta")
        return nn.ModuleDict({LEAF: part})

    def lend(self, lender: nn.Module) -> None:
        self.lent = (lender.get_submodule(LEAF),)

    def stand_in(self) -> nn.Module | None:
        return nn.ModuleDict({LEAF: self.lent[0]}) if self.lent else None

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """codes @ dictionary, multiplied in float32 and rounded once."""
        return (weight_of(self.codes) @ weight_of(self.atoms)).to(dtype or self._float_dtype())

    def leaves(self) -> dict[str, Leaf]:
        dictionary = leaf_of(self.atoms)
        codes = {CODES: leaf_of(self.codes, dictionary.weight)}
        return codes if self.lent else {LEAF: dictionary, **codes}

    def with_leaf(self, name: str, module: CompressedModule, second_moment: Tensor | None) -> DictionaryLinear:
        """A changed dictionary refits the coefficients, atom for atom where they are, unless they are compressed already."""
        if name == CODES:
            spec, codes = self.spec.with_leaf(name, module.spec), replaced(self.codes, module)
            assert isinstance(spec, DictionarySpec)
            if self.lent:
                changed = DictionaryLinear(spec, codes, bias=self.bias)
                changed.lent = self.lent
                return changed
            return DictionaryLinear(spec, self.atoms, codes, bias=self.bias)
        assert name == LEAF and not self.lent, name
        dictionary = replaced(self.atoms, module)
        spec = self.spec.with_leaf(name, module.spec)
        assert isinstance(spec, DictionarySpec)
        return DictionaryLinear(spec, dictionary, self._fitted_codes(dictionary, second_moment), bias=self.bias)

    def with_lent(self, lender: nn.Module, second_moment: Tensor | None) -> DictionaryLinear:
        dictionary = lender.get_submodule(LEAF)
        inside = dictionary.spec if isinstance(dictionary, CompressedModule) else None
        changed = DictionaryLinear(
            replace(self.spec, dictionary=inside), self._fitted_codes(dictionary, second_moment), bias=self.bias
        )
        changed.lent = (dictionary,)
        return changed

    def _fitted_codes(self, dictionary: nn.Module, second_moment: Tensor | None) -> nn.Module:
        """The codes that do best behind `dictionary` what these do behind the present one:

        minimise  tr((C D - C' D') H (C D - C' D')^T) + a |C - C'|^2,    a = damping mean(diag(D' H D'^T))
        """
        codes = self.codes
        sparse = isinstance(codes, SparseLinear) and not codes.spec.bits
        if not sparse and not isinstance(codes, nn.Linear):
            return codes
        before, changed = weight_of(self.atoms), weight_of(dictionary)
        weighted = changed if second_moment is None else changed @ second_moment.to(changed)
        values = weight_of(codes)
        mask = codes.mask() if isinstance(codes, SparseLinear) else torch.ones_like(values, dtype=torch.bool)
        gram, wanted = weighted @ changed.T, values @ (before @ weighted.T)
        added = REFIT_DAMPING * float(gram.diagonal().mean())
        gram.diagonal().add_(added)
        found = fitted(gram, wanted + added * values, values, mask, REFIT_STEPS)
        if isinstance(codes, SparseLinear):
            assert codes.weight_values is not None
            stored = found.to(codes.weight_values.dtype)
            return SparseLinear.from_weight(stored, mask, codes.spec.n, codes.spec.m)
        return linear_with(found.to(codes.get_parameter("weight").dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for part in self.lent:  # where it is the lender's own, nothing is left to be done the second time
            part._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        spec = self.spec
        whose = "" if spec.shared is None else f", dictionary of {spec.shared}"
        return f"{spec.in_features} -> {spec.out_features}, {spec.rank} atoms{whose}"


def _width(dictionary: Any) -> int:
    return int(dictionary.in_features)
