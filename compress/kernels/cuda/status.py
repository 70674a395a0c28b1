"""What `compress doctor` says about the CUDA kernels: which of nvcc, GPU, library and a passed check is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from compress.kernels.cuda import build, gpus, native

CHECK = "bash scripts/gpu_check.sh"


@dataclass(frozen=True)
class Machine:
    """What was found: GPUs as (name, compute capability), a compiler, and why there is no library (None: there is one)."""

    gpus: Sequence[tuple[str, tuple[int, int]]]
    nvcc: str | None
    absent: str | None
    stale: bool = False
    architectures: str = ""  # of the library


def this_machine() -> Machine:
    """Looks."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = [(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in range(count)]
    return Machine(found, build.nvcc(), native.absent(), native.stale(), native.architectures())


def report(machine: Machine) -> tuple[Literal["ok", "note"], str, str]:
    """Status, what was found, and what to do."""
    library = "not built" if machine.absent is not None else "built"
    compiler = "nvcc is there" if machine.nvcc else "no nvcc"
    if not machine.gpus:
        return "ok", f"not used: torch sees no NVIDIA GPU; {library}, {compiler}", ""
    if machine.absent is not None:
        remedy = build.COMMAND if machine.nvcc else f"install the CUDA toolkit (nvcc), then {build.COMMAND}"
        if machine.absent == "COMPRESS_CUDA_LIBRARY=off":
            remedy = "unset COMPRESS_CUDA_LIBRARY"
        return "note", f"references in torch on the GPU, slow: {machine.absent}; {compiler}", remedy
    if machine.stale:
        return "note", "built, but older than the sources beside it", build.COMMAND
    said = [gpus.unusable(name, capability, machine.architectures) for name, capability in machine.gpus]
    reasons = [why for why in said if why is not None]
    if reasons:
        return "note", f"built, but not the default: {'; '.join(reasons)}", f"{CHECK}, then COMPRESS_CUDA_KERNELS=1"
    return "ok", f"in use on {', '.join(name for name, _ in machine.gpus)}", ""
