"""Registers, spills and instructions of every CUDA kernel on every architecture: `python scripts/cuda_resources.py`.

Compiles everything (about two minutes on one core); needs nvcc, and for the instructions nvdisasm (pip install
nvidia-cuda-nvdisasm), but no GPU. Fails if a kernel spills, takes more registers than it may, or lacks its instructions.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from compress.kernels.cuda.build import ARCHITECTURES, UNITS, BuildError, compile_unit
from compress.kernels.cuda.resources import disassembler, instructions, resources, wrong_instructions

SHOWN = ("HMMA", "LDGSTS", "LDS", "LOP3", "HFMA2")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES))
    given = parser.parse_args()
    program, faults = disassembler(), []
    if program is None:
        print("nvdisasm is missing: instructions are not looked at (pip install nvidia-cuda-nvdisasm)", file=sys.stderr)
    print(f"{'arch':6} {'registers':>9} " + " ".join(f"{name:>7}" for name in SHOWN) + f" {'all':>6}  kernel")
    with tempfile.TemporaryDirectory() as folder:
        for architecture in given.arch:
            for unit in UNITS:
                cubin = Path(folder) / f"{unit}.cubin"
                try:
                    said = compile_unit(unit, [architecture], cubin, "-cubin")
                except BuildError as error:
                    print(f"error: {error}", file=sys.stderr)
                    return 1
                counts = instructions(cubin, program) if program else {}
                for found in resources(said):
                    mine = counts.get(found.kernel)
                    faults += [found.excess(), wrong_instructions(found.kernel, mine) if mine else None]
                    shown = [sum(n for name, n in mine.items() if name.startswith(s)) for s in SHOWN] if mine else []
                    total = sum(mine.values()) if mine else 0
                    columns = " ".join(f"{n:7}" for n in shown)
                    print(f"{architecture:6} {found.registers:9} {columns} {total:6}  {found.kernel}", flush=True)
    for fault in filter(None, faults):
        print(f"error: {fault}", file=sys.stderr)
    return 1 if any(faults) else 0


if __name__ == "__main__":
    raise SystemExit(main())
