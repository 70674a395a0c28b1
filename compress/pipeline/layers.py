"""The layers of a streamed model: as a step gets them, and as they run once a step has replaced them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from compress.calibration.capture import Gate
from compress.checkpoint.reader import TORCH_DTYPES, CheckpointReader
from compress.checkpoint.stream import StreamedModel, load_module, rebuild_module
from compress.errors import CheckpointError
from compress.methods.base import Outcome
from compress.models.architecture import Architecture, Site
from compress.modules.base import CompressedModule
from compress.pipeline.plan import Plan
from compress.pipeline.targets import Target


def as_stored(architecture: Architecture, name: str, weight: Tensor) -> Tensor:
    """A weight [out_features, in_features] as the layer itself has it, or the other way round."""
    outer = (*architecture.head.linears, *architecture.embedding.linears)
    return weight.T.contiguous() if architecture.transposed and name not in outer else weight


class Layers:
    """The layers of `model`, the source of a plan, which runs in `compute_dtype`."""

    def __init__(self, plan: Plan, model: StreamedModel, compute_dtype: torch.dtype, device: torch.device):
        self.plan, self.model, self.compute_dtype, self.device = plan, model, compute_dtype, device
        self.float_dtype = TORCH_DTYPES[plan.float_dtype]

    def target(self, name: str, site: Site, before: Outcome | None) -> Target:
        """A layer of the block that is loaded, of which the steps before made `before`."""
        module = self.model.skeleton.module(name)
        if isinstance(module, Gate):
            module = module.target
        bias = getattr(module, "bias", None)
        if before is not None:
            return Target(name, None, bias, before.module, site.layer_kind)
        if isinstance(module, CompressedModule):  # of the source; it runs in the dtype of the pass
            return Target(name, None, bias, copy.deepcopy(module).to(self.float_dtype), site.layer_kind)
        weight = module.get_parameter("weight").detach().float()
        return Target(name, as_stored(self.plan.architecture, name, weight), bias, None, site.layer_kind)

    def outer_target(self, site: Site, before: Outcome | None) -> Target:
        """The head or the token table, of which the steps before made `before`."""
        name, reader = site.linears[0], self.model.reader
        bias = reader.read(f"{name}.bias") if f"{name}.bias" in reader else None
        if before is not None:
            return Target(name, None, bias, before.module, site.layer_kind)
        if name in self.plan.source_specs:
            module = load_module(name, self.plan.source_specs[name], reader, self.float_dtype)
            return Target(name, None, bias, module, site.layer_kind)
        return Target(name, self._outer_weight(name), bias, None, site.layer_kind)

    def _outer_weight(self, name: str) -> Tensor:
        """The head's or the table's weight in float32, whatever it is stored as; checked."""
        architecture = self.plan.architecture
        if name == architecture.head.linears[0] and architecture.tied:
            name = architecture.embedding.linears[0]
        if name in self.plan.source_specs:
            return self.read(name, self.model.reader, self.plan.source_specs).dense(torch.float32)
        weight = self.model.reader.read(f"{name}.weight", torch.float32)
        if not torch.isfinite(weight).all():
            raise CheckpointError(f"{self.model.folder}: tensor {name}.weight holds NaN or infinity; fetch it again")
        return weight

    def source_weight(self, name: str) -> Tensor:
        """The weight of a layer of the blocks in float32 [out_features, in_features], read from the source."""
        if name in self.plan.source_specs:
            return self.read(name, self.model.reader, self.plan.source_specs).dense(torch.float32)
        return as_stored(self.plan.architecture, name, self.model.reader.read(f"{name}.weight", torch.float32))

    def running(self, name: str, module: CompressedModule) -> nn.Module:
        """The module as it will be once loaded from disk in the compute dtype."""
        if module.spec.plain:
            return self._ordinary(name, module)
        stored, lender = module.stored(), module.stand_in()
        running = rebuild_module(name, module.spec, stored, self.compute_dtype, lender).to(self.device)
        running.hold(self.compute_dtype)
        return running

    def _ordinary(self, name: str, module: CompressedModule) -> nn.Module:
        """The layer of the model itself, with the weight of `module`."""
        layer = self.model.skeleton.module(name)
        layer = copy.copy(layer.target if isinstance(layer, Gate) else layer)
        if isinstance(layer, CompressedModule):  # of a source that was compressed
            return module.to(self.compute_dtype).to(self.device)
        weight = as_stored(self.plan.architecture, name, module.dense(self.compute_dtype)).to(self.device)
        layer._parameters = {**layer._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
        return layer

    def read(self, name: str, reader: CheckpointReader, specs: dict[str, Any] | None = None) -> CompressedModule:
        """A compressed module by its name on disk; of the result unless `specs` are given."""
        return load_module(name, (specs or self.plan.specs)[name], reader, self.compute_dtype)
