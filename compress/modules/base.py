"""What every compressed module can do, so that pipeline, loader, report and export need know none of them by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.modules.spec import ModuleSpec


@dataclass(frozen=True)
class Leaf:
    """A matrix inside a module that a later step may compress in turn: float32 [out_features, in_features].

    Its input is `input_map` x for the input x of the module; None: x itself. So what is known about x (its second moment
    H) need not be measured again for the leaf (it is T H T^T).

    `mask`: where entries may differ from 0, and whoever compresses the leaf must leave the others at 0; None: everywhere.
    """

    weight: Tensor
    input_map: Tensor | None = None  # T [in_features, the module's in_features]
    mask: Tensor | None = None  # bool [out_features, in_features]


class CompressedModule(nn.Module, ABC):
    """A replaced linear or table. Its state_dict is what is stored: the tensors of `spec`, and `bias` if any."""

    spec: ModuleSpec
    held: Tensor | None = None  # a dense copy for repeated forwards; neither saved nor copied nor moved
    lent: tuple[nn.Module, ...] = ()  # parts that another module stores (`spec.lender`); not in this one's state

    @classmethod
    @abstractmethod
    def from_spec(
        cls, spec: ModuleSpec, bias: bool, dtype: torch.dtype, device: torch.device | str = "meta"
    ) -> CompressedModule:
        """An unfilled module, for a loader to fill. `dtype` is the dtype of its float tensors."""

    @abstractmethod
    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight it stands for, [out_features, in_features]; by default in the dtype of its own float tensors."""

    @property
    def weight(self) -> Tensor:
        """`dense()`, decoded anew at each access: for model code that looks at a linear's weight, or its dtype."""
        weight = self.dense()
        weight._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers initialises what lacks this mark
        return weight

    def adopt(self, original: nn.Module) -> None:
        """Take over what the module in whose place this one is put does beside its weight. Usually nothing."""
        return

    def stored(self) -> dict[str, Tensor]:
        """The tensors that are stored, by suffix: those of `spec`, and `bias` if there is one."""
        return dict(self.state_dict())

    def leaves(self) -> dict[str, Leaf]:
        """What a later step may compress, in data order, names as in `spec.leaf_shapes`. By default the weight as a whole."""
        return {"": Leaf(self.dense(torch.float32))}

    def with_leaf(self, name: str, module: CompressedModule, second_moment: Tensor | None) -> CompressedModule:
        """This module with `module` in the place of leaf `name`; its spec is `spec.with_leaf(name, module.spec)`.

        Leaves behind `name` are fitted anew, so that together they come as close as they can to what this module computed
        before, on inputs with `second_moment` H [in_features, in_features]; None: as if H were the identity.
        """
        assert name == "", name
        return module

    @classmethod
    def part_to_lend(cls, spec: ModuleSpec, dtype: torch.dtype) -> nn.Module:
        """A stand-in for the lender of a module of `spec` on the meta device; `spec.borrowed` is its state, to be filled."""
        raise NotImplementedError(f"{spec.representation} borrows nothing")

    def lend(self, lender: nn.Module) -> None:
        """Use the parts of `lender`, the module of that name or a stand-in, which `spec.borrowed` describes."""
        raise NotImplementedError(f"{self.spec.representation} borrows nothing")

    def stand_in(self) -> nn.Module | None:
        """For the lender, holding what is lent to this module; None if nothing is."""
        return None

    def with_lent(self, lender: nn.Module, second_moment: Tensor | None) -> CompressedModule:
        """This module fitted anew to other parts that are lent to it, as `with_leaf` fits leaves behind a changed one."""
        raise NotImplementedError(f"{self.spec.representation} borrows nothing")

    def scale_rows(self, scale: Tensor) -> None:
        """Multiply the rows of the weight, and the bias, by `scale` [out_features], powers of two. Where `spec.scales_rows`."""
        raise NotImplementedError

    def tunable(self) -> dict[str, Tensor]:
        """The stored float tensors, by suffix, in which `dense()` is linear piece by piece, so that gradients can move them while
        everything else stays; the bias is not one of them. None by default."""
        return {}

    def tuning_gradients(self, by_weight: Tensor) -> dict[str, Tensor]:
        """Gradients by what is `tunable`, float32, for the gradient by the weight [out_features, in_features]."""
        return {}

    def check_stored(self, name: str) -> None:
        """Raises: CheckpointError naming the tensor of module `name` whose contents, as they were loaded, cannot be."""
        return

    def hold(self, dtype: torch.dtype) -> None:
        """Keep a dense copy in `dtype` until `release`, so that repeated forwards do not decode again."""
        self.held = self.dense(dtype).detach()

    def release(self) -> None:
        """Let go of the dense copy."""
        self.held = None

    @property
    def nbytes(self) -> int:
        """Bytes stored, the bias not counted; equals `spec.nbytes`."""
        return sum(t.nbytes for name, t in self.state_dict().items() if name != "bias")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.release()  # .to(), .half(), .cuda(): the copy would stay behind
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.release()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "held"}
