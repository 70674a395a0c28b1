"""Methods by name. Looking one up imports that one only; listing names imports none."""

from __future__ import annotations

import difflib
import importlib
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from compress.errors import RecipeError

if TYPE_CHECKING:
    from compress.methods.base import SiteMethod
    from compress.methods.rewrite import ModelMethod
    from compress.methods.tuning import TuningMethod

METHODS = {  # name -> where it lives
    "rtn": "compress.methods.rtn:RTN",
    "gptq": "compress.methods.gptq:GPTQ",
    "lut": "compress.methods.lut:LUT",
    "signround": "compress.methods.signround:SignRound",
    "cbq": "compress.methods.cbq:CBQ",
    "lqer": "compress.methods.lqer:LQER",
    "lq_lora": "compress.methods.lq_lora:LQLoRA",
    "lq_signround": "compress.methods.lq_signround:LQSignRound",
    "prune": "compress.methods.prune:Prune",
    "cospadi": "compress.methods.cospadi:CoSpaDi",
    "armor": "compress.methods.armor:Armor",
    "bitstack": "compress.methods.bitstack:BitStack",
    "svd": "compress.methods.svd:SVD",
    "laser": "compress.methods.laser:LASER",
    "dobi_svd": "compress.methods.dobi_svd:DobiSVD",
    "cur": "compress.methods.cur:CUR",
    "distill": "compress.methods.distill:Distill",
    "slicegpt": "compress.methods.slicegpt:SliceGPT",
    "rotate": "compress.methods.rotate:Rotate",
    "drop_blocks": "compress.methods.drop_blocks:DropBlocks",
}

ENTRY_POINTS = "compress.methods"  # the group in which an outside package names its methods


def names() -> list[str]:
    """Every method that a recipe can name: ours, then those of installed packages. Imports none of them."""
    return [*METHODS, *sorted(_outside())]


def find(name: str) -> type[SiteMethod] | type[ModelMethod] | type[TuningMethod]:
    """The class of method `name`. Ours win over an outside package's of the same name.

    Raises: RecipeError naming the nearest method, or the package whose method cannot be imported.
    """
    if name in METHODS:
        module, _, attribute = METHODS[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    outside = _outside()
    if name in outside:
        return _load(outside[name])
    known = names()
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
    raise RecipeError(f"method {name!r} does not exist; {hint}")


def _outside() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS) if point.name not in METHODS}


def _load(point: EntryPoint) -> type[SiteMethod] | type[ModelMethod] | type[TuningMethod]:
    package = point.dist.name if point.dist else "an installed package"
    try:
        method = point.load()
    except Exception as error:  # another author's code: whatever it raises, the reader should know whose it is
        raise RecipeError(
            f"method {point.name!r} of {package} ({point.value}) cannot be imported: {error!r}"
        ) from error
    from compress.methods.base import SiteMethod
    from compress.methods.rewrite import ModelMethod
    from compress.methods.tuning import TuningMethod

    if not (isinstance(method, type) and issubclass(method, (SiteMethod, ModelMethod, TuningMethod))):
        raise RecipeError(
            f"method {point.name!r} of {package}: {point.value} is no compress.methods.base.SiteMethod, "
            f"compress.methods.rewrite.ModelMethod or compress.methods.tuning.TuningMethod"
        )
    return method
