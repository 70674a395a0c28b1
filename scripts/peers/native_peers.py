"""ggml and ik_llama.cpp through the drivers that scripts/peers/CMakeLists.txt builds, for scripts/bench_peers.py."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np

# name of a type -> bits of its codes, whether rows are to be interleaved when they are loaded (ggml), our twin
TYPES = {
    "ggml": {
        "q4_0": (4, True), "q4_K": (4, True), "q8_0": (8, True), "q3_K": (3, False), "q2_K": (2, True), "q4_0 plain": (4, False),
    },
    "ik": {
        "q4_0_r8": (4, False), "q4_k_r4": (4, False), "q8_0_r8": (8, False), "q8_k_r8": (8, False), "q3_k_r4": (3, False),
        "q2_k_r4": (2, False), "bf16_r16": (16, False),
    },
}  # fmt: skip
HUGE = " +2M"  # behind a name: the peer's weights on pages of 2M, which it does not ask for itself


class Driver:
    """libpeer_NAME.so."""

    def __init__(self, path: Path):
        self._library = ctypes.CDLL(str(path))
        pointer, number, floats = ctypes.c_void_p, ctypes.c_int64, np.ctypeslib.ndpointer(np.float32, flags="C")
        self._library.peer_type.argtypes = [ctypes.c_char_p]
        self._library.peer_open.restype = pointer
        self._library.peer_open.argtypes = [
            ctypes.c_int, floats, number, number, number, number,
            ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int,
        ]  # fmt: skip
        self._library.peer_close.argtypes = [pointer]
        self._library.peer_bytes.argtypes = [pointer]
        self._library.peer_bytes.restype = number
        self._library.peer_input.argtypes = [pointer, floats]
        self._library.peer_run.argtypes = [pointer, ctypes.c_int]
        self._library.peer_output.argtypes = [pointer, ctypes.c_int, floats]

    def open(
        self,
        type_name: str,
        rows: np.ndarray,
        out: int,
        tokens: int,
        copies: int,
        threads: int,
        repack: bool,
        huge: bool,
    ) -> int | None:
        """A product with `rows` [n, in], repeated to `out` rows; None: not on this machine, or no such type."""
        number = self._library.peer_type(type_name.encode())
        if number < 0:
            return None
        found: int | None = self._library.peer_open(
            number, rows, rows.shape[0], out, rows.shape[1], tokens, copies, threads, repack, huge
        )
        return found

    def close(self, handle: int) -> None:
        self._library.peer_close(handle)

    def nbytes(self, handle: int) -> int:
        """Of one copy of the weight."""
        found: int = self._library.peer_bytes(handle)
        return found

    def set_input(self, handle: int, x: np.ndarray) -> None:
        self._library.peer_input(handle, x)

    def run(self, handle: int, copy: int) -> None:
        self._library.peer_run(handle, copy)

    def output(self, handle: int, copy: int, tokens: int, out: int) -> np.ndarray:
        y = np.empty((tokens, out), np.float32)
        self._library.peer_output(handle, copy, y)
        return y
