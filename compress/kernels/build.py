"""Building the compiled kernels: `python -m compress.kernels.build`, and what installing the package does.

Needs CMake and a C++17 compiler. Without them everything runs on the references in torch, only slower; `compress doctor`
says which. Knows the standard library only, so that the build of a wheel can load it by its path.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "cpu"
LIBRARY = Path(__file__).parent / "lib" / "compress_kernels.so"
COMMAND = "python -m compress.kernels.build"
MINUTES = 15  # a build that takes longer hangs


class BuildError(Exception):
    """Why there is no library; one line, with the remedy."""


def source_digest() -> str:
    """Of all files the library is built from; the library tells the one of its own."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".cpp", ".h", ".txt"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def build(library: Path = LIBRARY, folder: Path | None = None, sanitize: bool = False, verbose: bool = False) -> Path:
    """Compile into `library`, replaced at once when all went well. `folder`: keeps the objects, for quick rebuilds.

    Raises: BuildError.
    """
    if os.name != "posix":
        raise BuildError(f"no compiled kernels on {sys.platform}: the references in torch are used")
    cmake = shutil.which("cmake")
    if cmake is None:
        raise BuildError(f"cmake is missing: pip install cmake (or the system's package), then {COMMAND}")
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if name):
        raise BuildError(f"no C++ compiler: install g++ or clang, or name one in CXX, then {COMMAND}")
    with tempfile.TemporaryDirectory(prefix="compress-kernels-") as temporary:
        objects = Path(folder or temporary)
        settings = [f"-DCK_SOURCE_DIGEST={source_digest()}", f"-DCK_SANITIZE={'ON' if sanitize else 'OFF'}"]
        _run([cmake, "-S", str(SOURCES), "-B", str(objects), "-DCMAKE_BUILD_TYPE=Release", *settings], verbose)
        _run([cmake, "--build", str(objects), "--parallel", str(min(os.cpu_count() or 1, 8))], verbose)
        try:
            library.parent.mkdir(parents=True, exist_ok=True)
            partial = library.with_suffix(f".{os.getpid()}.part")
            shutil.copy2(objects / LIBRARY.name, partial)
            os.replace(partial, library)  # processes that have the old one mapped keep it
        except OSError as error:
            raise BuildError(f"{library.parent} cannot be written: {error}") from None
    return library


def _run(command: list[str], verbose: bool) -> None:
    try:
        done = subprocess.run(command, capture_output=not verbose, text=True, timeout=60 * MINUTES)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{' '.join(command[:2])}: {error}") from None
    if done.returncode and verbose:
        raise BuildError("the compiler refuses, see above")
    if done.returncode:
        lines = (done.stdout + done.stderr).splitlines()
        errors = [line for line in lines if "error" in line.lower()] or lines[-1:] or ["no output"]
        raise BuildError(f"the compiler refuses: {errors[0].strip()}; {COMMAND} --verbose shows all of it")


def main() -> int:
    """Build, and say where the library is."""
    import argparse

    parser = argparse.ArgumentParser(prog=COMMAND, description="Build the compiled kernels of compress.")
    parser.add_argument("--output", type=Path, default=LIBRARY, help="where the library goes")
    parser.add_argument("--folder", type=Path, help="keeps the objects, for quick rebuilds")
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UndefinedBehaviorSanitizer")
    parser.add_argument("--verbose", action="store_true", help="show what the compiler says")
    given = parser.parse_args()
    try:
        print(build(given.output, given.folder, given.sanitize, given.verbose))  # noqa: T201
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
