"""The library of compiled kernels (compress/kernels/cpu): found, checked, loaded once; or why there is none.

    COMPRESS_KERNELS   path of a library to take in place of the one that was built here; `off`: none
    COMPRESS_CPU_ISA   instruction set, in place of the fastest one this processor has: portable, avx2, ...

It uses the threads of torch: the OpenMP runtime that torch has mapped is lent to it, and calls say how many threads.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int32, c_int64, c_uint64, c_void_p
from functools import lru_cache
from pathlib import Path

import torch

from compress.errors import RecipeError
from compress.kernels.build import COMMAND, LIBRARY, SOURCES, source_digest

ABI_VERSION = 1  # CK_ABI_VERSION
LAYOUT_VERSION = 1  # CK_LAYOUT_VERSION
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Weight(Structure):
    """ck_weight."""

    _fields_ = [
        ("version", c_int32),
        ("bits", c_int32),
        ("symmetric", c_int32),
        ("zero_point", c_int32),
        ("scale_dtype", c_int32),
        ("reserved", c_int32),
        ("out_features", c_int64),
        ("in_features", c_int64),
        ("group_size", c_int64),
    ]


class SignBlock(Structure):
    """ck_sign_block."""

    _fields_ = [("signs", c_void_p), ("left", c_void_p), ("right", c_void_p), ("rank", c_int64)]


# name -> (what it returns, what it takes): compress_kernels.h. Another family of kernels adds its functions here.
FUNCTIONS: dict[str, tuple[type, tuple[type, ...]]] = {
    "ck_abi_version": (c_int32, ()),
    "ck_source_digest": (c_char_p, ()),
    "ck_status_text": (c_char_p, (c_int,)),
    "ck_isa_count": (c_int, ()),
    "ck_isa_name": (c_char_p, (c_int,)),
    "ck_isa_supported": (c_int, (c_int,)),
    "ck_isa_current": (c_int, ()),
    "ck_isa_set": (c_int, (c_int,)),
    "ck_threads_used": (c_int, (c_int,)),
    "ck_weight_bytes": (c_int64, (POINTER(Weight),)),
    "ck_weight_pack": (
        c_int,
        (POINTER(Weight), c_void_p, c_int64, c_int32, c_void_p, c_void_p, c_void_p, c_int64, c_int32),
    ),
    "ck_linear_workspace": (c_int64, (POINTER(Weight), c_int64, c_int32)),
    "ck_linear": (
        c_int,
        (
            POINTER(Weight), c_void_p, c_int64, c_void_p, c_int32, c_int64, c_int64, c_void_p, c_int32, c_void_p, c_int64,
            c_int32, c_void_p, c_int64, c_int32,
        ),
    ),
    "ck_hadamard_workspace": (c_int64, (c_int64, c_int32)),
    "ck_hadamard": (
        c_int,
        (
            c_void_p, c_int32, c_int64, c_int64, c_int64, c_void_p, c_int32, c_void_p, c_int64, c_float, c_void_p, c_int64,
            c_void_p, c_int64, c_int32,
        ),
    ),
    "ck_sign_planes_workspace": (c_int64, (c_int64, c_int64)),
    "ck_sign_planes_linear": (
        c_int,
        (
            POINTER(SignBlock), c_int64, c_int64, c_int64, c_void_p, c_void_p, c_int32, c_int64, c_int64, c_void_p, c_int32,
            c_void_p, c_int64, c_int32, c_void_p, c_int64, c_int32,
        ),
    ),
    "ck_sign_planes_rows_workspace": (c_int64, (POINTER(SignBlock), c_int64, c_int64, c_int64)),
    "ck_sign_planes_factors": (c_int, (POINTER(SignBlock), c_int64, c_int64, c_int64, c_void_p, c_int64, c_int32)),
    "ck_sign_planes_rows": (
        c_int,
        (
            POINTER(SignBlock), c_int64, c_int64, c_int64, c_void_p, c_int64, c_int64, c_void_p, c_int32, c_int64, c_void_p,
            c_int64, c_int32,
        ),
    ),
    "ck_token_norm": (c_int, (c_void_p, c_void_p, c_void_p, c_int32, c_int64, c_float)),
    "ck_token_gated": (c_int, (c_void_p, c_void_p, c_void_p, c_int32, c_int64)),
    "ck_token_turn": (
        c_int,
        (c_void_p, c_void_p, c_void_p, c_int32, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_int64),
    ),
    "ck_rows_workspace": (c_int64, (c_int64, c_int64)),
    "ck_rows_linear": (
        c_int,
        (
            c_void_p, c_void_p, c_int32, c_int64, c_int64, c_void_p, c_int32, c_void_p, c_int32, c_int64, c_int32, c_void_p,
            c_int64, c_int32,
        ),
    ),
    "ck_rows_dense": (c_int, (c_void_p, c_void_p, c_int32, c_int64, c_int32)),
    "ck_lut_workspace": (c_int64, (c_int64, c_int64)),
    "ck_lut_linear": (
        c_int,
        (
            c_void_p, c_void_p, c_int32, c_int64, c_int64, c_void_p, c_int32, c_void_p, c_int32, c_int64, c_void_p, c_int64,
            c_int32,
        ),
    ),
    "ck_lut_dense": (c_int, (c_void_p, c_void_p, c_int32, c_int64, c_int32)),
    "ck_roofline_read": (c_int, (c_void_p, c_int64, c_int32, POINTER(c_uint64))),
    "ck_roofline_compute": (c_int64, (c_int32, c_int64, c_int32)),
}  # fmt: skip


@lru_cache(maxsize=1)
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why."""
    asked = os.environ.get("COMPRESS_KERNELS", "")
    if asked.lower() == "off":
        return None, "COMPRESS_KERNELS=off"
    path = Path(asked) if asked else LIBRARY
    if not path.is_file():
        return None, f"{path} is not there: {COMMAND}" if asked else f"not built yet: {COMMAND}"
    try:
        lend_threads()
        library = ctypes.CDLL(str(path))
        library.ck_abi_version.restype = c_int32
        version = library.ck_abi_version()
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be loaded: {error}; build it anew: {COMMAND}"
    if version != ABI_VERSION:
        return None, f"{path} has interface version {version}, {ABI_VERSION} is needed: {COMMAND}"
    try:
        for name, (returns, takes) in FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = returns, list(takes)
    except AttributeError as error:
        return None, f"{path} lacks a function: {error}; build it anew: {COMMAND}"
    isa = os.environ.get("COMPRESS_CPU_ISA", "")
    if isa:
        _set_isa(library, isa)
    return library, ""


def lend_threads() -> None:
    """Make the OpenMP runtime that torch has mapped visible to the library, which does not link one itself."""
    mapped = None
    maps = Path("/proc/self/maps")
    if maps.is_file():
        paths = (line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines() if "libgomp" in line)
        mapped = next(paths, None)
    try:
        ctypes.CDLL(mapped or "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return  # a library built without OpenMP loads all the same


def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where there are none: the first time, a warning says why and what to do."""
    found, why = _loaded()
    if found is None:
        _warn(why)
    return found


def absent() -> str | None:
    """Why there are no compiled kernels, and what to do; None: there are."""
    found, why = _loaded()
    return None if found is not None else why


@lru_cache(maxsize=1)
def _warn(why: str) -> None:
    if os.environ.get("COMPRESS_KERNELS", "").lower() != "off":
        warnings.warn(f"no compiled kernels, the references in torch are used: {why}", stacklevel=4)


def stale() -> bool:
    """The library in use was built from other sources than those beside it."""
    found, _ = _loaded()
    return found is not None and SOURCES.is_dir() and found.ck_source_digest().decode() != source_digest()


def check(status: int, what: str) -> None:
    """Raises: RecipeError with what the library says about a negative status."""
    if status < 0:
        found = library()
        assert found is not None
        raise RecipeError(f"{what}: {found.ck_status_text(status).decode()}")


def isas() -> list[str]:
    """Instruction sets that are built in and that this processor has, slowest first."""
    found = library()
    if found is None:
        return []
    return [found.ck_isa_name(i).decode() for i in range(found.ck_isa_count()) if found.ck_isa_supported(i)]


def current_isa() -> str | None:
    """The instruction set in use."""
    found = library()
    return None if found is None else found.ck_isa_name(found.ck_isa_current()).decode()


@contextmanager
def using_isa(name: str) -> Iterator[None]:
    """Run with another instruction set, in all threads of this process."""
    found = library()
    if found is None:
        raise RecipeError(f"instruction set {name!r}: {absent()}")
    before = found.ck_isa_current()
    _set_isa(found, name)
    try:
        yield
    finally:
        found.ck_isa_set(before)


def _set_isa(found: ctypes.CDLL, name: str) -> None:
    names = [found.ck_isa_name(i).decode() for i in range(found.ck_isa_count())]
    supported = [n for i, n in enumerate(names) if found.ck_isa_supported(i)]
    if name not in names or found.ck_isa_set(names.index(name)):
        raise RecipeError(f"instruction set {name!r}: this processor and build have {', '.join(supported)}")
