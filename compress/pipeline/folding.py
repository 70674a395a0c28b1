"""Scales of a site's input that go into what makes it, so that nothing of them is stored: where that can be, and doing it.

A site with input x is given s x instead: a norm's weight (and bias) are multiplied by s, or the rows of the linear before it. The
linears of the site undo that. s are powers of two, so that the model is the same, bit for bit, before anything is compressed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compress.models.architecture import Architecture, Site

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.checkpoint.headers import TensorInfo
    from compress.methods.base import LayerShape, MethodConfig, SiteMethod
    from compress.modules.spec import ModuleSpec


def takes_scale(site: Site, architecture: Architecture, infos: Mapping[str, TensorInfo]) -> bool:
    """Whether what makes the input of `site` takes a scale, as far as the model goes."""
    producer = site.producer
    if producer is None or f"{producer.name}.weight" not in infos:
        return False
    if any(kind == site.kind for kind, _ in architecture.structure.hadamard):
        return False  # the input is transformed in between
    return producer.kind == "rows" or not architecture.norm_offset  # (1 + w) s - 1 is not what a float holds exactly


def folding_layers(
    method: type[SiteMethod],
    configs: Mapping[str, MethodConfig],
    weights: Mapping[str, tuple[Site, LayerShape]],
    current: Mapping[str, ModuleSpec],
) -> frozenset[str]:
    """The layers of a step whose inputs' scale is folded: those of sites that the step replaces as a whole.

    Args:
        current: what the steps before, and the source, have compressed.
    """
    from compress.methods.base import Kept

    def planned(name: str) -> ModuleSpec | Kept:
        return method.plan(replace(weights[name][1], folds=True), configs[name])

    def fits(site: Site) -> bool:
        for name in site.linears:
            if name not in configs or name in current or not method.can_fold(configs[name]):
                return False
            if not weights[name][1].folds or isinstance(planned(name), Kept):
                return False
        assert site.producer is not None
        maker = site.producer.name
        if site.producer.kind == "norm" or maker not in configs:
            return maker not in current
        spec = planned(maker)
        return maker not in current and (isinstance(spec, Kept) or spec.scales_rows)

    sites = {site.name: site for name, (site, _) in weights.items() if name in configs and weights[name][1].folds}
    return frozenset(name for site in sites.values() if fits(site) for name in site.linears)


def scaled(tensor: Tensor, scale: Tensor, transposed: bool) -> Tensor:
    """A norm's weight, a bias, or the rows of a matrix [out, in] ([in, out] where `transposed`), multiplied by `scale`."""
    scale = scale.to(tensor.device, tensor.dtype)
    return tensor * (scale[:, None] if tensor.ndim == 2 and not transposed else scale)


def scale_module(module: nn.Module, scale: Tensor, transposed: bool) -> None:
    """Multiply the outputs of a norm or an ordinary linear, in place."""
    for parameter in module.parameters(recurse=False):
        parameter.data = scaled(parameter.data, scale, transposed)


def scaled_input(module: nn.Module, scale: Tensor) -> nn.Module:
    """`module`, whose input is multiplied by `scale` first: as long as what makes it does not do that yet."""
    from torch import nn

    class Prescaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Any) -> Any:
            return self.module(x * scale.to(x.device, x.dtype))

    return Prescaled()
