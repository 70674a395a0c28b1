"""A linear as a dictionary and sparse codes: weight = codes @ dictionary, few coefficients per output.

dictionary.weight        float [atoms, in]       the atoms, as rows
codes.weight_positions   int32 [out, words]      which atoms each output uses: compress/kernels/position_layout.py, n of m atoms;
                                                 one bit per atom but for very few of them
codes.weight_values      float [out, kept]       their coefficients, in the order of the atoms
codes.weight             float [out, atoms]      in place of both, where every output uses every atom

A factor that a later step compressed stores its own tensors instead, under the same prefix, as the spec in `dictionary` or
`codes` says.

Modules of one `in_features` may share a dictionary: one of them stores it, the others name that one in `shared` and store
codes only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from compress.errors import CheckpointError
from compress.modules.factored_spec import FactoredSpec
from compress.modules.sparse_spec import SparseSpec
from compress.modules.spec import ModuleSpec

LEAF, CODES = "dictionary", "codes"


@dataclass(frozen=True)
class DictionarySpec(FactoredSpec):
    """`rank` atoms. `dictionary`, `codes`: how a factor is stored where it is not plain floats; `shared`: the module that stores
    the dictionary, where this one does not."""

    representation: ClassVar[str] = "dictionary"
    module: ClassVar[str] = "compress.modules.dictionary:DictionaryLinear"
    factors: ClassVar[tuple[str, ...]] = (LEAF, CODES)
    dictionary: ModuleSpec | None = None
    codes: ModuleSpec | None = None
    shared: str | None = None

    @classmethod
    def of_sizes(
        cls, in_features: int, out_features: int, n_atoms: int, n_kept: int, shared: str | None = None
    ) -> DictionarySpec:
        """In floats, `n_kept` of `n_atoms` coefficients per output; all of them where the numbers are equal."""
        codes = None if n_kept == n_atoms else SparseSpec.of_pattern(n_atoms, out_features, n_kept, n_atoms)
        return cls(in_features, out_features, n_atoms, None, codes, shared)

    @property
    def most(self) -> int:
        return max(self.in_features, self.out_features)  # of more use than either are none

    def factor_shapes(self) -> dict[str, tuple[int, int]]:
        return {LEAF: (self.rank, self.in_features), CODES: (self.out_features, self.rank)}

    def leaf_shapes(self) -> dict[str, tuple[int, int]]:
        shapes = self.factor_shapes()
        return shapes if self.shared is None else {CODES: shapes[CODES]}

    def masked_leaves(self) -> frozenset[str]:
        return super().masked_leaves() & self.leaf_shapes().keys()

    def lender(self) -> str | None:
        return self.shared

    def borrowed(self, float_dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        if self.shared is None:
            return {}
        tensors = replace(self, shared=None).tensors(float_dtype)
        return {suffix: tensor for suffix, tensor in tensors.items() if suffix.startswith(f"{LEAF}.")}

    def borrowing(self, lender: ModuleSpec) -> DictionarySpec:
        if not isinstance(lender, DictionarySpec) or lender.shared is not None:
            raise CheckpointError(f"shares the dictionary of {self.shared}, which stores none")
        if (lender.rank, lender.in_features) != (self.rank, self.in_features):
            raise CheckpointError(
                f"shares the dictionary of {self.shared}, which is {[lender.rank, lender.in_features]}, and needs one of "
                f"{[self.rank, self.in_features]}"
            )
        return replace(self, dictionary=lender.dictionary)

    def lent_by(self, name: str | None) -> DictionarySpec:
        return replace(self, shared=name)

    def validate(self) -> None:
        super().validate()
        if self.shared is not None and (not isinstance(self.shared, str) or not self.shared):
            raise CheckpointError(f"shared={self.shared!r:.200} is no name of a module")
