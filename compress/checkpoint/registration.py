"""Makes our format known to transformers as soon as its registry of quantizers is imported, and not before.

`import compress` must cost nothing: it neither imports transformers nor torch. So it leaves a hook in `sys.meta_path`
that waits for one module, lets the ordinary finders load it, and then adds our two entries to its tables.
"""

from __future__ import annotations

import importlib.abc
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"
METHOD = "compress"  # the quant_method of our format


def install() -> None:
    """Register now if transformers' registry is loaded, and whenever it is loaded from here on."""
    if not any(getattr(finder, "compress_llm", False) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook())
    if REGISTRY in sys.modules:
        register()


def register() -> None:
    """Add our config and quantizer to transformers' tables, unless something of that name is there already."""
    from transformers.quantizers import auto

    try:
        from compress.checkpoint.quantizer import CompressConfig, CompressQuantizer
    except ImportError as error:
        warnings.warn(
            f"compress-llm does not fit this transformers release, and is not registered: {error}", stacklevel=2
        )
        return
    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(CompressConfig)
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(METHOD)(CompressQuantizer)


class _Hook(importlib.abc.MetaPathFinder):
    compress_llm = True  # so that a reloaded package knows the hook of its predecessor

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(fullname, path, target)
                if spec is not None and spec.loader is not None:
                    _call_after(spec.loader)
                    return spec
        return None


def _call_after(loader: importlib.abc.Loader) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        register()

    loader.exec_module = exec_module  # type: ignore[method-assign]  # of this one instance; each module has its own
