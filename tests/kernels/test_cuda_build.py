"""What nvcc makes of the CUDA kernels, without a GPU: no spills, registers within bounds, the instructions that are meant.

To be quick, the linears are compiled for some widths and architectures; scripts/cuda_resources.py does all of them.
"""

from __future__ import annotations

import pytest

from compress.kernels.cuda import build
from compress.kernels.cuda.resources import Resources, disassembler, instructions, resources, wrong_instructions
from tests.kernels.emulated import Lock, cached

# unit, architecture, flags, kernels
COMPILED = [
    ("linear_decode", "80", ("-DCC_ONLY_BITS=4",), 6),
    ("linear_decode", "90a", ("-DCC_ONLY_BITS=3",), 6),
    ("linear_tensor", "80", ("-DCC_ONLY_BITS=4",), 6),
]


@pytest.mark.skipif(build.nvcc() is None, reason="nvcc is not there: the CUDA kernels are not compiled")
@pytest.mark.parametrize(("unit", "architecture", "flags", "n_kernels"), COMPILED)
def test_kernels_compile_to_what_is_meant(unit, architecture, flags, n_kernels):
    name = "-".join((unit, architecture, *flags))
    cubin, log = cached(name + ".cubin"), cached(name + ".log")
    with Lock(name):
        if not log.is_file():
            log.write_text(build.compile_unit(unit, [architecture], cubin, "-cubin", *flags))
    found = resources(log.read_text())
    assert len(found) == n_kernels
    assert [kernel.excess() for kernel in found if kernel.excess()] == []
    program = disassembler()
    if program is None:
        pytest.skip("nvdisasm is not there (pip install nvidia-cuda-nvdisasm): the instructions are not looked at")
    counts = instructions(cubin, program)
    assert {kernel.kernel for kernel in found} <= set(counts)
    assert [wrong_instructions(*item) for item in counts.items() if wrong_instructions(*item)] == []


def test_the_compilers_report_is_read():
    said = """ptxas info    : Compiling entry function '_Z13decode_kernelI3F16Li4ELi1EEv6Linear' for 'sm_80'
ptxas info    : Function properties for _Z13decode_kernelI3F16Li4ELi1EEv6Linear
    8 bytes stack frame, 12 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 90 registers, used 1 barriers, 496 bytes cmem[0]"""
    (kernel,) = resources(said)
    assert kernel == Resources("_Z13decode_kernelI3F16Li4ELi1EEv6Linear", "sm_80", 90, 8, 16)
    assert "16 bytes spilled" in kernel.excess()
    assert Resources(kernel.kernel, "sm_80", 169, 0, 0).excess() is not None
    assert Resources(kernel.kernel, "sm_80", 168, 0, 0).excess() is None


def test_without_a_compiler_the_error_names_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("NVCC", str(tmp_path / "nvcc"))
    with pytest.raises(build.BuildError, match="nvcc is missing: install the CUDA toolkit"):
        build.compile_unit("dequantize", ["80"], tmp_path / "x")


def test_objects_that_are_still_right_are_not_compiled_again(monkeypatch, tmp_path):
    """With a compiler that only notes what it is told."""
    notes = tmp_path / "notes"
    compiler = tmp_path / "nvcc"
    compiler.write_text(
        f'#!/bin/sh\ncase " $* " in *version*) echo 13; exit;; esac\necho "$@" >> {notes}\n'
        'while [ "$1" != -o ]; do shift; done\necho > "$2"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("NVCC", str(compiler))

    def compiled(*architectures: str) -> list[str]:
        notes.write_text("")
        build.build(tmp_path / "library.so", architectures, tmp_path / "objects", jobs=1)
        return [unit for unit in build.UNITS if f"{unit}.cu" in notes.read_text()]

    assert compiled("80", "90a") == list(build.UNITS)
    assert compiled("80", "90a") == []
    assert (tmp_path / "library.so").is_file()
    (tmp_path / "objects" / "hadamard.o").unlink()
    assert compiled("80", "90a") == ["hadamard"]
    assert compiled("90a") == list(build.UNITS)
