"""Build the compiled kernels with AddressSanitizer and UndefinedBehaviorSanitizer, and run their tests on that library.

    python scripts/check_sanitizers.py [--library FILE] [TEST ...]

Python is not built with the sanitizers, so their runtime is preloaded. Weights and activations then lie in ordinary memory,
where reading one byte too far is seen. Leaks are not looked for: the kernels allocate nothing. Takes some minutes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package beside this script, installed or not

from compress.kernels.build import BuildError, build

ROOT = Path(__file__).resolve().parent.parent
TESTS = [
    f"tests/kernels/test_{name}.py"
    for name in ("packed", "bfloat16_linear", "rows", "sparse", "lut", "token", "sign_planes", "transform", "roofline")
]
# Those trace Python, for minutes, and run no other kernel.
TRACING = "not opcheck and not compiles and not good_citizens"


def runtime(name: str) -> str:
    """The path of a runtime library of the compiler, empty if it has none."""
    compiler = os.environ.get("CXX", "g++")
    path = subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return path if Path(path).is_absolute() else ""


def main() -> int:
    """Build, run, and hand on the exit code of the tests."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, help="keep the sanitized library here, and use it if it is there")
    parser.add_argument("tests", nargs="*", default=TESTS)
    given = parser.parse_args()
    asan = runtime("libasan.so")
    if not asan:
        print("error: the compiler has no libasan.so: install its sanitizer runtime", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as temporary:
        library = given.library or Path(temporary) / "compress_kernels.so"
        if not library.is_file():
            try:
                build(library, sanitize=True)
            except BuildError as error:
                print(f"error: {error}", file=sys.stderr)
                return 1
        environment = {
            **os.environ,
            "LD_PRELOAD": f"{asan} {runtime('libstdc++.so.6')}",  # the second, so that torch's exceptions are seen
            "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:verify_asan_link_order=0",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
            "COMPRESS_KERNELS": str(library),
            "COMPRESS_HUGE_PAGES": "off",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", TRACING, *given.tests]
        return subprocess.run(command, env=environment, cwd=ROOT).returncode


if __name__ == "__main__":
    raise SystemExit(main())
