"""The library of CUDA kernels (`cuda/`): found, checked, loaded once; or why there is none. Errors carry op, shape, device.

COMPRESS_CUDA_LIBRARY   path of a library to take in place of the one that was built here; `off`: none
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, Structure, c_char_p, c_int, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

from compress.errors import RecipeError
from compress.kernels.cuda.build import COMMAND, LIBRARY, source_digest, sources

ABI_VERSION = 1  # CC_ABI_VERSION
LAYOUT_VERSION = 1  # CC_LAYOUT_VERSION


class Weight(Structure):
    """cc_weight."""

    _fields_ = [
        ("version", c_int32),
        ("bits", c_int32),
        ("symmetric", c_int32),
        ("scale_dtype", c_int32),
        ("out_features", c_int64),
        ("in_features", c_int64),
        ("group_size", c_int64),
        ("reserved", c_int64),
    ]


class Operands(Structure):
    """cc_operands."""

    _fields_ = [
        *((name, c_void_p) for name in ("x", "out", "bias", "hidden", "left", "workspace")),
        *((name, c_int64) for name in ("workspace_bytes", "tokens", "x_stride", "out_stride", "hidden_stride")),
        ("x_columns", c_int64),
        ("rank", c_int64),
        ("dtype", c_int32),
        ("splits", c_int32),
    ]


# name -> (what it returns, what it takes): compress_cuda.h
FUNCTIONS: dict[str, tuple[type, tuple[type, ...]]] = {
    "cc_abi_version": (c_int32, ()),
    "cc_source_digest": (c_char_p, ()),
    "cc_architectures": (c_char_p, ()),
    "cc_status_text": (c_char_p, (c_int,)),
    "cc_weight_bytes": (c_int64, (POINTER(Weight),)),
    "cc_linear_workspace": (c_int64, (POINTER(Weight), c_int64, c_int32)),
    "cc_linear_decode": (c_int, (POINTER(Weight), c_void_p, c_int64, POINTER(Operands), c_void_p)),
    "cc_linear_tensor": (c_int, (POINTER(Weight), c_void_p, c_int64, POINTER(Operands), c_void_p)),
    "cc_dequantize": (c_int, (POINTER(Weight), c_void_p, c_int64, c_void_p, c_int64, c_int32, c_void_p)),
    "cc_hadamard": (
        c_int,
        (
            c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int64, c_int32, c_int32, c_void_p, c_void_p, c_int32, c_int32,
            c_void_p,
        ),
    ),
    "cc_hadamard_largest": (c_int64, ()),
}  # fmt: skip


def load(path: Path) -> ctypes.CDLL:
    """The library at `path`, its functions typed.

    Raises: RecipeError if it cannot be used, with the remedy.
    """
    if not path.is_file():
        raise RecipeError(f"{path} is not there: {COMMAND}")
    try:
        library = ctypes.CDLL(str(path))
        library.cc_abi_version.restype = c_int32
        version = library.cc_abi_version()
        if version != ABI_VERSION:
            raise RecipeError(f"{path} has interface version {version}, {ABI_VERSION} is needed: {COMMAND}")
        for name, (returns, takes) in FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = returns, list(takes)
    except (OSError, AttributeError) as error:
        raise RecipeError(f"{path} cannot be loaded: {error}; build it anew: {COMMAND}") from None
    return library


@lru_cache(maxsize=1)
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    asked = os.environ.get("COMPRESS_CUDA_LIBRARY", "")
    if asked.lower() == "off":
        return None, "COMPRESS_CUDA_LIBRARY=off"
    try:
        return load(Path(asked) if asked else LIBRARY), ""
    except RecipeError as error:
        return None, f"not built yet: {COMMAND}" if not asked and not LIBRARY.is_file() else str(error)


def library() -> ctypes.CDLL | None:
    """The CUDA kernels; None where there are none."""
    return _loaded()[0]


def absent() -> str | None:
    """Why there are no CUDA kernels, and what to do; None: there are."""
    found, why = _loaded()
    return None if found is not None else why


def architectures() -> str:
    """What the library in use holds machine code for: "80 86 89 90a"; empty: there is none."""
    found = library()
    return "" if found is None else found.cc_architectures().decode()


def stale() -> bool:
    """The library in use was built from other sources than those beside it."""
    found = library()
    return found is not None and sources() is not None and found.cc_source_digest().decode() != source_digest()


def check(library: ctypes.CDLL, status: int, what: str) -> None:
    """Raises: RecipeError that names `what` (op, shape, device) for a status that is not 0; sizes are >= 0."""
    if status != 0:
        raise RecipeError(f"{what}: {library.cc_status_text(status).decode()}")
