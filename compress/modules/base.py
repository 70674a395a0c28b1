"""What every compressed module can do, so that pipeline, loader, report and export need know none of them by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.modules.spec import ModuleSpec


@dataclass(frozen=True)
class Leaf:
    """A matrix inside a module that a later step may compress in turn. `weight` is float32 [out_features, in_features]."""

    weight: Tensor


class CompressedModule(nn.Module, ABC):
    """A replaced linear (or embedding). Its state_dict is what is stored: the tensors of `spec`, and `bias` if there is one."""

    spec: ModuleSpec

    @classmethod
    @abstractmethod
    def from_spec(cls, spec: ModuleSpec, bias: bool, dtype: torch.dtype, device: torch.device | str) -> CompressedModule:
        """An unfilled module, for a loader to fill. `dtype` is the dtype of its float tensors."""

    @abstractmethod
    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight it stands for, [out_features, in_features]; by default in the dtype of its own float tensors."""

    @property
    def nbytes(self) -> int:
        """Bytes stored, the bias not counted; equals `spec.nbytes`."""
        return sum(t.nbytes for name, t in self.state_dict().items() if name != "bias")
