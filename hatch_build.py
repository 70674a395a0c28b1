"""Builds the compiled kernels when the package is installed, in a wheel or in place. Never stops an installation: without
a compiler or CMake it says so, and the references in torch run."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsHook(BuildHookInterface[Any]):
    """Puts the library beside its loader: in the checkout, and from there into the wheel."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        try:
            library = self._library()
        except Exception as error:  # whatever it is, the package works without
            self.app.display_warning(f"compiled kernels are not built, the references in torch are used: {error}")
            return
        if version != "editable":
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform}"
            build_data["force_include"][str(library)] = "compress/kernels/lib/" + library.name

    def _library(self) -> Path:
        build = _module(Path(self.root) / "compress" / "kernels" / "build.py")
        if not (build.LIBRARY.is_file() and build.source_digest().encode() in build.LIBRARY.read_bytes()):
            self.app.display_info("building the compiled kernels, about a minute")
            build.build()
        return Path(build.LIBRARY)


def _module(path: Path) -> ModuleType:
    """The module at `path`, without importing the package, whose dependencies a build does not have."""
    spec = importlib.util.spec_from_file_location("compress_kernels_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
