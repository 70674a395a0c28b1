import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

from tests.tiny_models import save_tiny

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Callable[[str], Path]:
    """A folder with a tiny model of a family, made once."""
    made: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("tiny")

    def get(family: str) -> Path:
        if family not in made:
            made[family] = save_tiny(family, root / family, tokenizer=False)
        return made[family]

    return get


@pytest.fixture(scope="session")
def stock(tmp_path_factory) -> Iterator[Callable[..., list[dict[str, Any]]]]:
    """Ask `stock.py`, one process in which compress cannot be imported, one job after the other."""
    folder = tmp_path_factory.mktemp("elsewhere")
    script = str(HERE / "stock.py")
    bar = "import sys, runpy; sys.modules['compress'] = None"  # it may be installed beside transformers
    code = f"{bar}; runpy.run_path({script!r}, run_name='__main__')"
    with (folder / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", code], cwd=folder, stdin=PIPE, stdout=PIPE, stderr=stderr, text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(*jobs: dict[str, Any]) -> list[dict[str, Any]]:
            answers = []
            for job in jobs:
                print(json.dumps(job, default=str), file=process.stdin, flush=True)
                for line in process.stdout:
                    if line.startswith("answer "):
                        answers.append(json.loads(line.removeprefix("answer ")))
                        break
            assert len(answers) == len(jobs), (folder / "stderr").read_text()[-3000:]
            return answers

        yield ask
        process.stdin.close()
        process.wait(timeout=60)
