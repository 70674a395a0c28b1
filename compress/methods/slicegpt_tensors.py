"""The tensors of a sliced model as functions of the original's (see slicegpt.py for the equations)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from compress.linalg.residual import centred, folded, folded_bias, rotated_inputs, rotated_outputs, rotated_rows
from compress.linalg.rotation import DenseRotation
from compress.methods.rewrite import ModelShape
from compress.models.derived import Derived
from compress.models.stream import Stream

Basis = Callable[[int], Tensor]  # number of a norm -> Q [D, d]


def sliced_tensors(
    model: ModelShape, stream: Stream, width: int, last_width: int, basis: Basis | None
) -> tuple[dict[str, Derived], frozenset[str]]:
    """Every tensor that is new or another one, and those that are gone: the norms'.

    Args:
        basis: None where only shapes are wanted.
    """
    tensors: dict[str, Derived] = {}
    removed: set[str] = set()
    maker = _Maker(model, stream, basis)
    for name in stream.embeddings:
        tensors[f"{name}.weight"] = maker.table(name, width)
    norms = [branch for branches in stream.branches for branch in branches]
    for k, branch in enumerate(norms):
        behind = last_width if k == len(norms) - 1 else width
        removed |= maker.of_norm(branch.norm)
        for name in branch.readers:
            tensors |= maker.reader(name, branch.norm, k, width)
        for name in branch.writers:
            tensors |= maker.writer(name, k + 1, behind)
        block = model.blocks[k // 2]
        shortcut = f"{block}.{'attn' if branch.kind == 'attention' else 'ffn'}_shortcut.weight"
        tensors[shortcut] = maker.shortcut(k, width, behind)
    removed |= maker.of_norm(stream.final_norm)
    tensors |= maker.head(len(norms), last_width)
    return tensors, frozenset(removed)


class _Maker:
    def __init__(self, model: ModelShape, stream: Stream, basis: Basis | None):
        self.shapes, self.stream, self._basis = model.shapes, stream, basis

    def rotation(self, norm: int) -> DenseRotation:
        assert self._basis is not None
        return DenseRotation(self._basis(norm))

    def of_norm(self, norm: str) -> set[str]:
        return {f"{norm}.{suffix}" for suffix in ("weight", "bias")} & self.shapes.keys()

    def gain(self, weight: Tensor) -> Tensor:
        return weight.double() + self.stream.norm_offset

    def oriented(self, weight: Tensor) -> Tensor:
        """[out, in] from how linears of the blocks lie on disk, and back."""
        return weight.T if self.stream.transposed else weight

    def shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        return (in_features, out_features) if self.stream.transposed else (out_features, in_features)

    def stored(self, name: str) -> tuple[int, int]:
        """(out, in) of a linear of a block."""
        rows, columns = self.shapes[f"{name}.weight"]
        return (columns, rows) if self.stream.transposed else (rows, columns)

    def table(self, name: str, width: int) -> Derived:
        def make(rows: Tensor) -> Tensor:
            return rotated_rows(centred(rows, 1) if self.stream.layer_norm else rows, self.rotation(0))

        rows = self.shapes[f"{name}.weight"][0]
        return Derived((rows, width), (f"{name}.weight",), make, by_rows=True)

    def reader(self, name: str, norm: str, k: int, width: int) -> dict[str, Derived]:
        out_features = self.stored(name)[0]

        def make(weight: Tensor, gain: Tensor) -> Tensor:
            return self.oriented(
                rotated_inputs(folded(self.oriented(weight), self.gain(gain)), self.rotation(k))
            ).contiguous()

        found = {f"{name}.weight": Derived(self.shape(out_features, width), (f"{name}.weight", f"{norm}.weight"), make)}
        if f"{norm}.bias" in self.shapes:

            def make_bias(weight: Tensor, shift: Tensor, bias: Tensor | None = None) -> Tensor:
                return folded_bias(self.oriented(weight), bias, shift)

            inputs = (f"{name}.weight", f"{norm}.bias", *self._bias(name))
            found[f"{name}.bias"] = Derived((out_features,), inputs, make_bias)
        return found

    def writer(self, name: str, k: int, width: int) -> dict[str, Derived]:
        in_features = self.stored(name)[1]

        def make(weight: Tensor) -> Tensor:
            weight = self.oriented(weight)
            weight = rotated_outputs(centred(weight, 0) if self.stream.layer_norm else weight, self.rotation(k))
            return self.oriented(weight).contiguous()

        def make_bias(bias: Tensor) -> Tensor:
            return rotated_outputs(centred(bias, 0) if self.stream.layer_norm else bias, self.rotation(k))

        found = {f"{name}.weight": Derived(self.shape(width, in_features), (f"{name}.weight",), make)}
        for bias in self._bias(name):
            found[bias] = Derived((width,), (bias,), make_bias)
        return found

    def shortcut(self, k: int, width: int, behind: int) -> Derived:
        def make() -> Tensor:
            assert self._basis is not None
            return self._basis(k + 1).double().T @ self._basis(k).double()  # [out, in] of a linear: A^T

        return Derived((behind, width), (), make)

    def head(self, k: int, width: int) -> dict[str, Derived]:
        head, norm = self.stream.head, self.stream.final_norm
        source = f"{self.stream.embeddings[0] if self.stream.tied else head}.weight"
        vocabulary = self.shapes[source][0]

        def make(rows: Tensor, gain: Tensor) -> Tensor:
            return rotated_rows(folded(rows, self.gain(gain)), self.rotation(k))

        found = {f"{head}.weight": Derived((vocabulary, width), (source, f"{norm}.weight"), make, by_rows=True)}
        if f"{norm}.bias" in self.shapes:

            def make_bias(rows: Tensor, shift: Tensor) -> Tensor:
                return folded_bias(rows, None, shift)

            assert not self._bias(head), f"{head}.bias"  # no family with LayerNorm has one
            found[f"{head}.bias"] = Derived((vocabulary,), (source, f"{norm}.bias"), make_bias, by_rows=True)
        return found

    def _bias(self, name: str) -> tuple[str, ...]:
        return (f"{name}.bias",) if f"{name}.bias" in self.shapes else ()
