"""Which module runs a representation: the torch side of `spec.SPECS`. Looking one up imports that one only."""

from __future__ import annotations

import importlib

from compress.modules.base import CompressedModule

MODULES = {  # representation -> where its module lives
    "quantized": "compress.modules.quantized:QuantizedModule",
}


def module_class(representation: str) -> type[CompressedModule]:
    """The class whose `from_spec` builds modules of this representation."""
    module, _, name = MODULES[representation].partition(":")
    return getattr(importlib.import_module(module), name)
