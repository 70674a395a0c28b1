"""The command `compress` of the package beside this script, installed or not."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from compress.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
