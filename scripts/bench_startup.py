"""How long the command line takes to answer: medians over a few runs of `compress --help` and `compress plan`.

python scripts/bench_startup.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {("--help",): 0.3, ("plan", "--recipe", "demo"): 5.0}  # arguments -> seconds allowed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=11)
    runs = parser.parse_args().runs
    slow = 0
    print("| command | median s | fastest s | allowed s |\n|--|--:|--:|--:|")
    for arguments, allowed in COMMANDS.items():
        seconds = []
        for _ in range(runs):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-m", "compress", *arguments], check=True, capture_output=True, cwd=ROOT)
            seconds.append(time.perf_counter() - start)
        slow += median(seconds) > allowed
        print(f"| compress {' '.join(arguments)} | {median(seconds):.2f} | {min(seconds):.2f} | {allowed} |")
    return int(slow > 0)


if __name__ == "__main__":
    raise SystemExit(main())
