"""The tensors of a rotated model as functions of the original's; `compress/linalg/residual.py` has the algebra.

    x = sum of tables;   per block   x += writers(... readers(norm(x)));   logits = head(final norm(x))

With R1, gains of norms become part of the readers behind them, norms stay with gains of 1, then what reads the stream, what
writes it and the tables are rotated. The shift of a LayerNorm goes to the readers' biases. Where a reader has none, as
the head, it stays with the norm: LayerNorm(x R) + shift', shift' = (shift / gain) R, of which the reader makes what it
made of shift.

Without R1, norms and tables are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from compress.errors import NumericsError
from compress.linalg.residual import (
    folded,
    folded_bias,
    rotated_head_inputs,
    rotated_heads,
    rotated_inputs,
    rotated_outputs,
    rotated_rows,
)
from compress.linalg.rotation import Rotation
from compress.methods.rewrite import ModelShape
from compress.models.derived import Derived
from compress.models.stream import Stream, ValueHeads


def rotated_tensors(
    model: ModelShape,
    stream: Stream,
    r1: Rotation | None,
    r2: Sequence[Rotation | None],
    online: Mapping[str, Rotation],
) -> dict[str, Derived]:
    """Every tensor that is another one, or new (the head's of a model in which it was the table's).

    Args:
        r1: of the stream; keeps the mean if norms are LayerNorm.
        r2: of the value heads of each block.
        online: "attention" or "mlp" -> what the input of the branch's writers goes through while the model runs.
    """
    maker = _Maker(model, stream, r1)
    tensors: dict[str, Derived] = {}
    if r1 is not None:
        for name in stream.embeddings:
            tensors |= maker.table(name, r1)
        tensors |= maker.head(r1)
    for branches, heads, values in zip(stream.branches, stream.heads, r2, strict=True):
        for branch in branches:
            biased = all(f"{name}.bias" in model.shapes for name in branch.readers)
            for name in branch.readers:
                tensors |= maker.reader(name, branch.norm, biased, (heads, values) if name == heads.values else None)
            for name in branch.writers:
                columns = (heads, values) if name == heads.output else None
                tensors |= maker.writer(name, columns, online.get(branch.kind))
            if r1 is not None:
                tensors |= maker.norm(branch.norm, biased, r1)
    return tensors


class _Maker:
    def __init__(self, model: ModelShape, stream: Stream, r1: Rotation | None):
        self.shapes, self.stream, self.r1 = model.shapes, stream, r1

    def oriented(self, weight: Tensor) -> Tensor:
        """[out, in] from how linears of the blocks lie on disk, and back."""
        return weight.T if self.stream.transposed else weight

    def gain(self, weight: Tensor) -> Tensor:
        return weight.double() + self.stream.norm_offset

    def present(self, *names: str) -> tuple[str, ...]:
        return tuple(name for name in names if name in self.shapes)

    def table(self, name: str, rotation: Rotation) -> dict[str, Derived]:
        weight = f"{name}.weight"
        made = Derived(self.shapes[weight], (weight,), lambda rows: rotated_rows(rows, rotation), by_rows=True)
        return {weight: made}

    def head(self, rotation: Rotation) -> dict[str, Derived]:
        """A weight of its own from now on: the last gain is in it, and not in the table."""
        head, norm = self.stream.head, self.stream.final_norm
        source = f"{self.stream.embeddings[0] if self.stream.tied else head}.weight"

        def make(rows: Tensor, *gains: Tensor) -> Tensor:
            for gain in gains:
                rows = folded(rows, self.gain(gain))
            return rotated_rows(rows, rotation)

        inputs = (source, *self.present(f"{norm}.weight"))
        made = {f"{head}.weight": Derived(self.shapes[source], inputs, make, by_rows=True)}
        return made | self.norm(norm, False, rotation)

    def norm(self, norm: str, biased: bool, rotation: Rotation) -> dict[str, Derived]:
        """Gain 1. Its shift becomes 0 if the readers are `biased`, else stays here."""
        gain, shift = f"{norm}.weight", f"{norm}.bias"
        left = 1 - self.stream.norm_offset

        def moved(s: Tensor, *gains: Tensor) -> Tensor:
            s = s.double()
            for g in gains:
                used = self.gain(g)
                if bool(((used == 0) & (s != 0)).any()):
                    raise NumericsError(
                        f"{norm}: has a shift where its gain is 0, which nothing behind it can take over"
                    )
                s = torch.where(s == 0, 0.0, s / used)
            return rotation.times(s)

        found = {}
        for name in self.present(gain):
            found[name] = Derived(self.shapes[name], (), lambda: torch.full(self.shapes[gain], left))
        for name in self.present(shift):
            if biased:
                found[name] = Derived(self.shapes[name], (), lambda: torch.zeros(self.shapes[shift]))
            else:
                found[name] = Derived(self.shapes[name], (shift, *self.present(gain)), moved)
        return found

    def reader(
        self, name: str, norm: str, biased: bool, values: tuple[ValueHeads, Rotation | None] | None
    ) -> dict[str, Derived]:
        """A linear behind a norm; `values`: the value heads that are among its outputs, and their R2."""
        r1, turned = self.r1, _outputs(values)
        if r1 is None and turned is None:
            return {}
        gains = self.present(f"{norm}.weight") if r1 is not None else ()
        shifts = self.present(f"{norm}.bias") if r1 is not None and biased else ()

        def make(weight: Tensor, *gains: Tensor) -> Tensor:
            weight = self.oriented(weight)
            for gain in gains:
                weight = folded(weight, self.gain(gain))
            weight = weight if r1 is None else rotated_inputs(weight, r1)
            return self.oriented(weight if turned is None else turned(weight))

        def make_bias(bias: Tensor, *shifted: Tensor) -> Tensor:
            if shifted:
                weight, shift = shifted
                bias = folded_bias(self.oriented(weight), bias, shift)
            return bias if turned is None else turned(bias)

        weight = f"{name}.weight"
        found = {weight: Derived(self.shapes[weight], (weight, *gains), make)}
        if shifts or turned is not None:
            for bias in self.present(f"{name}.bias"):
                inputs = (bias, weight, *shifts) if shifts else (bias,)
                found[bias] = Derived(self.shapes[bias], inputs, make_bias)
        return found

    def writer(
        self, name: str, values: tuple[ValueHeads, Rotation | None] | None, online: Rotation | None
    ) -> dict[str, Derived]:
        """A linear whose outputs are added to the stream; `values`: the query heads that are its inputs, and R2."""
        r1 = self.r1

        def make(weight: Tensor) -> Tensor:
            weight = self.oriented(weight)
            if values is not None and values[1] is not None:
                weight = rotated_head_inputs(weight, values[0].head_dim, values[1])
            weight = weight if online is None else rotated_inputs(weight, online)
            return self.oriented(weight if r1 is None else rotated_outputs(weight, r1))

        weight, found = f"{name}.weight", {}
        if r1 is not None or online is not None or (values is not None and values[1] is not None):
            found[weight] = Derived(self.shapes[weight], (weight,), make)
        for bias in self.present(f"{name}.bias"):
            if r1 is not None:
                found[bias] = Derived(self.shapes[bias], (bias,), lambda b: rotated_outputs(b, r1))
        return found


def _outputs(values: tuple[ValueHeads, Rotation | None] | None) -> Callable[[Tensor], Tensor] | None:
    """What R2 does to a value projection's weight [out, in] or bias [out]."""
    if values is None or values[1] is None:
        return None
    heads, rotation = values[0], values[1]
    return lambda x: rotated_heads(x, heads.starts, heads.head_dim, rotation)
