"""Which kernel runs for how many tokens, per GPU, and on which GPUs the kernels have run at all.

A kernel that never ran on a GPU is not the default there: `scripts/gpu_check.sh` checks and times all of them and prints the
entries for the tables here. COMPRESS_CUDA_KERNELS=1 uses them on any GPU, =0 on none.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from compress.kernels.cuda.build import COMMAND

Path = Literal["decode", "tensor", "dequantize"]
DECODE_TOKENS = 16  # the most that the decode kernel takes
LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Choice:
    """decode up to `decode` tokens, tensor up to `tensor`, above that the weight is dequantised for the library's product.

    Splits are chosen so that `decode_waves` (`tensor_waves`) thread blocks come on each multiprocessor.
    """

    decode: int = DECODE_TOKENS
    tensor: int = 64
    decode_waves: int = 4
    tensor_waves: int = 1

    def path(self, tokens: int) -> Path:
        if tokens <= self.decode:
            return "decode"
        return "tensor" if tokens <= self.tensor else "dequantize"


UNKNOWN = Choice()  # from the arithmetic of docs/kernels-cuda.md, not from measurement

# name as torch.cuda.get_device_name gives it -> what was measured best there
CHOICES: dict[str, Choice] = {}

# name -> (date, commit) of the gpu_check that passed there; docs/kernels-cuda.md has the figures
VERIFIED: dict[str, tuple[str, str]] = {}


def choice(name: str) -> Choice:
    """The table's entry, or what is safe on any GPU."""
    return CHOICES.get(name, UNKNOWN)


def unusable(name: str, capability: tuple[int, int], architectures: str = "") -> str | None:
    """Why the kernels do not run on this GPU by default; None: they do. `architectures`: of the library, if there is one."""
    asked = os.environ.get("COMPRESS_CUDA_KERNELS", "")
    if capability < LEAST_CAPABILITY:
        return f"{name} has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0"
    if architectures and not holds(architectures, capability):
        return (
            f"the library was built for sm_{architectures.replace(' ', ', sm_')}, and {name} needs another: {COMMAND}"
        )
    if asked == "1":
        return None
    if asked == "0":
        return "COMPRESS_CUDA_KERNELS=0"
    if name not in VERIFIED:
        return (
            f"the kernels have never run on {name}: scripts/gpu_check.sh checks them, COMPRESS_CUDA_KERNELS=1 uses them"
        )
    return None


def holds(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether a library built for these ("80 86 89 90a") has code that such a GPU runs.

    Machine code runs on the same major version and the same minor one or a higher one, that of an `a` on its own version
    alone; what is newer runs the PTX of the first, if that is no `a`.
    """
    names = architectures.split()
    for architecture in names:
        built = divmod(int(architecture.rstrip("a")), 10)
        if built == capability or (architecture[-1] != "a" and built[0] == capability[0] and built < capability):
            return True
    return names[0][-1] != "a" and divmod(int(names[0]), 10) < capability


def splits(row_blocks: int, input_blocks: int, multiprocessors: int, path: Path, choose: Choice) -> int:
    """Into how many parts the inputs are cut, so that every multiprocessor has work: 1 to 64, of at least 4 blocks each.

    Rounded down: thread blocks that find no place run after all others, alone.
    """
    rows, waves = (row_blocks, choose.decode_waves) if path == "decode" else (-(-row_blocks // 4), choose.tensor_waves)
    return max(1, min(waves * multiprocessors // rows, input_blocks // 4, 64))
