"""Which module runs a representation. Looking one up imports that one only."""

from __future__ import annotations

import importlib

from compress.modules.base import CompressedModule
from compress.modules.spec import spec_class


def module_class(representation: str) -> type[CompressedModule]:
    """The class whose `from_spec` builds modules of this representation, which is known (it has a spec)."""
    spec = spec_class(representation)
    assert spec is not None, representation
    module, _, name = spec.module.partition(":")
    return getattr(importlib.import_module(module), name)
