"""What the compiler made of the kernels: registers, spills, and the instructions of the machine code.

Without a GPU this is all that can be known of their speed: `scripts/cuda_resources.py` prints it, tests hold it to LIMITS.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# Registers that a kernel may use: 65536 / (threads of a block * blocks on a multiprocessor that its speed counts on).
LIMITS = {
    "decode": 168,  # 128 threads: 3 blocks, as many as an H100's shared memory holds of 8 bits and 16 tokens
    "tensor": 255,  # 256 threads: 1 block
    "dequantize": 128,
    "hadamard": 128,  # 512 threads: 1 block
    "add_splits": 64,
}
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)")
SECTION = re.compile(r"^\s*\.section\s+\.text\.(\w+)")


@dataclass(frozen=True)
class Resources:
    """Of one kernel on one architecture."""

    kernel: str  # mangled
    architecture: str
    registers: int
    stack_bytes: int
    spill_bytes: int

    @property
    def family(self) -> str:
        """A key of LIMITS."""
        return next(name for name in LIMITS if f"{name}_kernel" in self.kernel)

    def excess(self) -> str | None:
        """What is too much; None: nothing."""
        where = f"{self.kernel} on {self.architecture}"
        if self.stack_bytes or self.spill_bytes:
            return f"{where}: {self.spill_bytes} bytes spilled, {self.stack_bytes} bytes of stack"
        if self.registers > LIMITS[self.family]:
            return f"{where}: {self.registers} registers, more than {LIMITS[self.family]}"
        return None


def resources(said: str) -> list[Resources]:
    """From what nvcc says with -Xptxas -v, in its order."""
    found = []
    kernel, architecture, frame = "", "", (0, 0, 0)
    for line in said.splitlines():
        if entry := ENTRY.search(line):
            kernel, architecture = entry.groups()
        elif sizes := FRAME.search(line):
            frame = (int(sizes[1]), int(sizes[2]), int(sizes[3]))
        elif (used := USED.search(line)) and kernel:
            found.append(Resources(kernel, architecture, int(used[1]), frame[0], frame[1] + frame[2]))
            kernel, frame = "", (0, 0, 0)
    return found


def disassembler() -> str | None:
    """nvdisasm: on the path, or of the package nvidia-cuda-nvdisasm."""
    packaged = [str(path) for folder in sys.path for path in Path(folder or ".").glob("nvidia/*/bin/nvdisasm")]
    return shutil.which("nvdisasm") or next(iter(packaged), None)


def instructions(cubin: Path, program: str) -> dict[str, Counter[str]]:
    """Kernel -> how often each instruction stands in its machine code, modifiers included (HMMA.16816.F32.BF16)."""
    text = subprocess.run([program, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    counts: dict[str, Counter[str]] = {}
    kernel = ""
    for line in text.splitlines():
        if section := SECTION.match(line):
            kernel = section[1]
            counts[kernel] = Counter()
        elif kernel and (instruction := INSTRUCTION.match(line)):
            counts[kernel][instruction[1]] += 1
    return counts


def wrong_instructions(kernel: str, counts: Counter[str]) -> str | None:
    """What a kernel's machine code lacks, or should not have; None: it is as meant."""

    def number(prefix: str) -> int:
        return sum(n for name, n in counts.items() if name.startswith(prefix))

    for forbidden in (
        "LDL",
        "STL",
        "ATOM",
        "RED.",
    ):  # local memory: an array that is indexed; atomics: other sums each run
        if number(forbidden):
            return f"{kernel}: {number(forbidden)} {forbidden}"
    wanted: dict[str, int] = {}
    for family, per_tile in (("decode_kernel", {"1": 1, "2": 2}), ("tensor_kernel", {"1": 4, "2": 4})):
        if family in kernel:
            bits, last = re.findall(r"Li(\d+)E", kernel)
            tiles = per_tile[last]  # of 8 tokens
            product = "HMMA.16816.F32.BF16" if "I4BF16" in kernel else "HMMA.16816.F32"
            wanted = {product: (16 + 4 + 16) * tiles, "LDGSTS.E.BYPASS.128": int(bits), "LDS.128": int(bits)}
            # a block: 4 steps x 4 row tiles; 4 sums of x; a block of ranks: 16
    for name, least in wanted.items():
        if counts[name] < least if name.startswith("HMMA") else number(name) < least:
            return f"{kernel}: {counts[name]} {name}, at least {least} were meant"
    return None
