"""Building the CUDA kernels: `python -m compress.kernels.cuda.build`. Needs nvcc, and no GPU.

Without nvcc everything runs on the references in torch; `compress doctor` says what is missing. Knows the standard library only.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PACKAGE = Path(__file__).parents[2]
LIBRARY = Path(__file__).parent.parent / "lib" / "compress_cuda.so"
COMMAND = "python -m compress.kernels.cuda.build"
UNITS = ("interface", "dequantize", "hadamard", "linear_decode", "linear_tensor")
ARCHITECTURES = ("80", "86", "89", "90a")  # A100; RTX 30, A10; RTX 40, L40; H100. Newer ones run the PTX of the first
FLAGS = ("-std=c++17", "-O3", "-Xptxas", "-v", "-Xcompiler", "-fPIC,-fvisibility=hidden")
MINUTES = 20  # a build that takes longer hangs


class BuildError(Exception):
    """Why there is no library; one line, with the remedy."""


def sources() -> Path | None:
    """The folder of the sources: in the wheel, or beside the package in a checkout."""
    for folder in (PACKAGE / "cuda", PACKAGE.parent / "cuda"):
        if (folder / "compress_cuda.h").is_file():
            return folder
    return None


def source_digest() -> str:
    """Of all files the library is built from; the library tells the one of its own."""
    folder = _source(UNITS[0]).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".cu", ".cpp", ".h"):
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def nvcc() -> str | None:
    """The compiler: NVCC, or that of CUDA_HOME, or the one on the path."""
    named = os.environ.get("NVCC")
    if named:
        return shutil.which(named)
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None) or shutil.which("nvcc")


def compile_unit(unit: str, architectures: Sequence[str], to: Path, *flags: str) -> str:
    """One source into an object, or with -cubin into machine code; what the compiler says, resources of kernels included.

    Raises: BuildError.
    """
    return _run([*_command(unit, architectures, *flags), "-o", str(to), str(_source(unit))])


def _source(unit: str) -> Path:
    folder = sources()
    if folder is None:
        raise BuildError("the sources of the CUDA kernels are not there: pip install --force-reinstall compress-llm")
    return folder / f"{unit}.cu"


def _command(unit: str, architectures: Sequence[str], *flags: str) -> list[str]:
    """nvcc and all it is told but the files."""
    compiler = nvcc()
    if compiler is None:
        raise BuildError(f"nvcc is missing: install the CUDA toolkit, or name one in NVCC, then {COMMAND}")
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    if "-cubin" not in flags and not architectures[0].endswith("a"):  # PTX, for GPUs that are newer than all of them
        codes.append(f"-gencode=arch=compute_{architectures[0]},code=compute_{architectures[0]}")
    names = []
    if unit == "interface":  # the unit that tells them
        names = [f'-DCC_SOURCE_DIGEST="{source_digest()}"', f'-DCC_ARCHITECTURES="{" ".join(architectures)}"']
    return [compiler, *FLAGS, *names, *codes, *([] if "-cubin" in flags else ["-c"]), *flags]


def _object(unit: str, architectures: Sequence[str], to: Path) -> str:
    """`compile_unit` into `to`, unless it lies there from the same sources and command; what the compiler said then."""
    source, command = _source(unit), _command(unit, architectures)
    state = hashlib.sha256("\0".join([*command, _run([command[0], "--version"])]).encode())
    for path in (*sorted(source.parent.glob("*.h")), source):
        state.update(path.read_bytes() + b"\0")
    log = to.with_suffix(".log")
    first, _, said = log.read_text().partition("\n") if log.is_file() and to.is_file() else ("", "", "")
    if first != state.hexdigest():
        said = compile_unit(unit, architectures, to)
        log.write_text(f"{state.hexdigest()}\n{said}")
    return said


def build(
    library: Path = LIBRARY, architectures: Sequence[str] = ARCHITECTURES, folder: Path | None = None, jobs: int = 0
) -> str:
    """Compile into `library`, replaced at once when all went well; returns what the compiler said.

    Args:
        folder: keeps the objects; those that lie there from the same sources are not compiled again.
        jobs: compilers at a time; 0: as many as cores.

    Raises: BuildError.
    """
    with tempfile.TemporaryDirectory(prefix="compress-cuda-") as temporary:
        objects = folder or Path(temporary)
        objects.mkdir(parents=True, exist_ok=True)
        targets = [objects / f"{unit}.o" for unit in UNITS]
        with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
            said = list(pool.map(lambda u, t: _object(u, architectures, t), reversed(UNITS), reversed(targets)))
        compiler = nvcc()
        assert compiler is not None
        linked = objects / LIBRARY.name
        said.append(_run([compiler, "-shared", "-o", str(linked), *map(str, targets)]))
        try:
            library.parent.mkdir(parents=True, exist_ok=True)
            partial = library.with_suffix(f".{os.getpid()}.part")
            shutil.copy2(linked, partial)
            os.replace(partial, library)
        except OSError as error:
            raise BuildError(f"{library.parent} cannot be written: {error}") from None
    return "\n".join(said)


def build_emulation(library: Path, *flags: str) -> Path:
    """The same sources for the CPU, run lane by lane (cuda/emulate): what tests use where there is no GPU.

    Raises: BuildError.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
    folder = sources()
    if compiler is None or folder is None:
        raise BuildError("no C++ compiler: install g++ or clang, or name one in CXX")
    warnings = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
    names = (f'-DCC_SOURCE_DIGEST="{source_digest()}"', '-DCC_ARCHITECTURES="emulation"')
    source = str(folder / "emulate" / "all.cpp")
    library.parent.mkdir(parents=True, exist_ok=True)
    partial = library.with_suffix(f".{os.getpid()}.part")
    _run(
        [
            compiler,
            "-std=c++17",
            "-O1",
            "-U_FORTIFY_SOURCE",
            "-shared",
            "-fPIC",
            *warnings,
            *names,
            *flags,
            source,
            "-o",
            str(partial),
        ]
    )
    os.replace(partial, library)
    return library


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 * MINUTES)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from None
    said = done.stdout + done.stderr
    if done.returncode:
        lines = said.splitlines()
        errors = [line for line in lines if "error" in line.lower()] or lines[-1:] or ["no output"]
        raise BuildError(f"the compiler refuses: {errors[0].strip()}")
    return said


def main() -> int:
    """Build, and say where the library is."""
    import argparse

    parser = argparse.ArgumentParser(prog=COMMAND, description="Build the CUDA kernels of compress.")
    parser.add_argument("--output", type=Path, default=LIBRARY, help="where the library goes")
    parser.add_argument("--folder", type=Path, help="keeps the objects, and takes what is there and still right")
    parser.add_argument("--jobs", type=int, default=0, help="compilers at a time; 0: as many as cores")
    parser.add_argument(
        "--arch", nargs="+", default=list(ARCHITECTURES), metavar="SM", help=f"default: {' '.join(ARCHITECTURES)}"
    )
    parser.add_argument("--verbose", action="store_true", help="show registers and shared memory of every kernel")
    given = parser.parse_args()
    try:
        said = build(given.output, given.arch, given.folder, given.jobs)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    if given.verbose:
        print(said, file=sys.stderr)  # noqa: T201
    print(given.output)  # noqa: T201
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
