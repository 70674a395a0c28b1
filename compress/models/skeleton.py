"""The model without its weights: transformers' own modules on meta, filled and emptied one block at a time.

Names are names on disk throughout; `families.module_name` leads from there to the module tree. When it is built, the
skeleton is held to the architecture's table, so a linear that no site knows of is an error and not a silent miss.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compress.errors import CheckpointError
from compress.models.architecture import Architecture
from compress.models.experts import unfuse_experts
from compress.models.families import disk_name, module_name
from compress.models.restructure import restructure
from compress.modules.base import CompressedModule

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Slots = dict[str, tuple[nn.Module, str]]  # tensor's name on disk -> the module that holds it, and under which attribute


class Skeleton:
    """A causal language model on meta, in eval mode, with experts unfused and buffers that no file holds computed.

    Attributes:
        model: what AutoModelForCausalLM builds from the config, with attention as it chooses for the family.
        blocks: the decoder blocks in order.
    """

    def __init__(self, config: PretrainedConfig, architecture: Architecture, dtype: torch.dtype) -> None:
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM
        from transformers.initialization import no_init_weights

        config = copy.deepcopy(config)
        if hasattr(config, "quantization_config"):  # of a source that is compressed already: we build the plain model
            del config.quantization_config
        config.tie_word_embeddings = architecture.tied
        with no_init_weights():
            # Buffers that no checkpoint holds (rotary tables, …) stay real. Matrices begin on meta: to allocate them, if only
            # for a moment each, took 1.1 GB of address space for 70 blocks that was not given back.
            with init_empty_weights(include_buffers=False), _EmptyOnMeta():
                self.model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
            unfuse_experts(self.model, architecture)
            restructure(self.model, architecture)
        self.model.requires_grad_(False)
        self.architecture = architecture
        self.dtype = dtype
        self.blocks: list[nn.Module] = [self.module(name) for name in architecture.blocks]
        _check(self)
        inside = [list(block.modules()) for block in self.blocks]
        within = {id(module) for modules in inside for module in modules}
        self._original = [_Contents(modules) for modules in inside]
        self._original_outside = _Contents([m for m in self.model.modules() if id(m) not in within])
        self._original_head = self.module(architecture.head.linears[0])

    def module(self, disk_name: str) -> nn.Module:
        """The linear, norm, embedding, block or head of that name. Raises: CheckpointError if the model has none."""
        name = module_name(self.architecture, disk_name)
        try:
            return self.model.get_submodule(name)
        except AttributeError:
            raise CheckpointError(
                f"{disk_name}: {type(self.model).__name__} has no module {name}; the checkpoint or config.json is not "
                f"what the family {self.architecture.family!r} has, or this transformers release changed it"
            ) from None

    def replace(self, disk_name: str, module: nn.Module) -> None:
        """Put `module` in the place of the module of that name. It stays until `empty_block` or `empty_outside`."""
        original = self.module(disk_name)
        if isinstance(module, CompressedModule):
            module.adopt(original)
        parent, _, child = module_name(self.architecture, disk_name).rpartition(".")
        setattr(self.model.get_submodule(parent), child, module)

    def block_tensors(self, index: int) -> Slots:
        """Every tensor that a checkpoint holds for the block as it is now, replaced modules included."""
        return self._slots(self.blocks[index], self.architecture.blocks[index])

    def outside_tensors(self) -> Slots:
        """Every tensor that a checkpoint holds outside the blocks. A head that is tied is the embedding's tensor."""
        inside = {id(module) for block in self.blocks for module in block.modules()}
        slots: Slots = {}
        for name, module in self.model.named_modules():
            if id(module) not in inside and not (module is self._original_head and self.architecture.tied):
                slots.update(_own_slots(module, disk_name(self.architecture, name)))
        return slots

    def fill(self, tensor_name: str, tensor: Tensor) -> None:
        """Put a tensor from disk in its place. Floats take the model's dtype; a tied head follows its embedding.

        Raises: CheckpointError if the model has no such tensor or one of another shape.
        """
        owner, _, attribute = tensor_name.rpartition(".")
        module = self.module(owner)
        expected: Tensor | None = module._parameters.get(attribute)
        if expected is None:
            expected = module._buffers.get(attribute)
        if expected is None:
            raise CheckpointError(f"{tensor_name}: {owner} is a {type(module).__name__} and has no {attribute}")
        if expected.shape != tensor.shape:
            raise CheckpointError(
                f"{tensor_name}: shape {list(tensor.shape)} on disk, {list(expected.shape)} by config.json; "
                f"the two are not of one model"
            )
        if tensor.is_floating_point() != expected.is_floating_point():
            raise CheckpointError(f"{tensor_name}: {tensor.dtype} on disk where the model has {expected.dtype}")
        value = tensor.to(expected.dtype)
        _set(module, attribute, value)
        if self.architecture.tied and tensor_name == f"{self.architecture.embedding.linears[0]}.weight":
            _set(self._original_head, "weight", value)

    def empty_block(self, index: int) -> None:
        """Put the block back as it was built: its own modules, on meta."""
        self._original[index].restore()

    def empty_outside(self) -> None:
        """Put embeddings, final norm and head back as they were built."""
        self._original_outside.restore()

    def _slots(self, root: nn.Module, prefix: str) -> Slots:
        module_prefix = module_name(self.architecture, prefix)
        slots: Slots = {}
        for name, module in root.named_modules(prefix=module_prefix):
            slots.update(_own_slots(module, disk_name(self.architecture, name)))
        return slots


class _EmptyOnMeta(TorchFunctionMode):
    """`torch.empty`, with which modules make their matrices, allocates nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class _Contents:
    """What modules hold: children, parameters and persistent buffers, to be put back later."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.saved = [
            (m, dict(m._modules), dict(m._parameters), {n: m._buffers[n] for n in _persistent(m)}) for m in modules
        ]

    def restore(self) -> None:
        for module, children, parameters, buffers in self.saved:
            module._modules.update(children)
            module._parameters.update(parameters)
            module._buffers.update(buffers)


def _persistent(module: nn.Module) -> list[str]:
    buffers = module._buffers
    return [n for n, b in buffers.items() if b is not None and n not in module._non_persistent_buffers_set]


def _own_slots(module: nn.Module, name: str) -> Slots:
    held = [n for n, p in module._parameters.items() if p is not None] + _persistent(module)
    return {f"{name}.{attribute}": (module, attribute) for attribute in held}


def _set(module: nn.Module, attribute: str, value: Tensor) -> None:
    if attribute in module._parameters:
        module._parameters[attribute] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[attribute] = value


def _check(skeleton: Skeleton) -> None:
    """Holds the model to its table: every name exists with the right class, and no matrix in a block is left out."""
    from transformers.pytorch_utils import Conv1D

    arch = skeleton.architecture
    linear_class: type[nn.Module] = Conv1D if arch.transposed else nn.Linear
    for name in (*arch.embeddings, arch.final_norm, *(norm for norms in arch.block_norms for norm in norms)):
        if name is not None:
            skeleton.module(name)
    skeleton.module(arch.head.linears[0])
    siblings = skeleton.model.get_submodule(module_name(arch, arch.blocks[0]).rpartition(".")[0])
    if len(list(siblings.children())) != arch.n_blocks:
        raise _mismatch(arch, f"{len(list(siblings.children()))} blocks were built where the table has {arch.n_blocks}")

    for block, sites in zip(arch.blocks, arch.block_sites, strict=True):
        in_sites = Counter(name for site in sites for name in site.linears)
        twice = [name for name, n in in_sites.items() if n > 1]
        if twice:
            raise _mismatch(arch, f"{twice[0]} is in more than one site")
        for site in sites:
            widths = set()
            for name in site.linears:
                linear = skeleton.module(name)
                if type(linear) is not linear_class:
                    raise _mismatch(arch, f"{name} is a {type(linear).__name__}, not a {linear_class.__name__}")
                widths.add(linear.get_parameter("weight").shape[0 if arch.transposed else 1])
            if len(widths) > 1:
                raise _mismatch(arch, f"the linears of {site.name} have inputs of different width: {sorted(widths)}")
        known = {f"{block}.{arch.experts.router}"} if arch.experts else set()
        if arch.structure.width is not None:
            known |= {f"{block}.attn_shortcut", f"{block}.ffn_shortcut"}
        for tensor_name, (module, attribute) in skeleton._slots(skeleton.module(block), block).items():
            owner = tensor_name.rpartition(".")[0]
            if getattr(module, attribute).ndim > 1 and owner not in in_sites and owner not in known:
                raise _mismatch(arch, f"{tensor_name} is a matrix that no site knows of")


def _mismatch(architecture: Architecture, what: str) -> CheckpointError:
    return CheckpointError(
        f"{what}; the table of family {architecture.family!r} does not fit the model that transformers builds "
        f"from this config.json"
    )
