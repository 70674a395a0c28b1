"""A finished run and a way to give command lines."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from compress.cli.main import main
from tests.tiny_models import save_tiny


@dataclass(frozen=True)
class Answer:
    """What a command line came to."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error. Fails if there is more than one line, or anything on stdout."""
        assert self.code != 0
        assert self.out == ""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        return lines[0]


Command = Callable[..., Answer]


@pytest.fixture
def compress(capsys: pytest.CaptureFixture[str]) -> Command:
    """`compress("plan", "--recipe", "demo")`, in this process."""

    def command(*arguments: object) -> Answer:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return command


def process(*arguments: object, **options: object) -> subprocess.Popen[str]:
    """A command line in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    line = [sys.executable, "-m", "compress", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    return subprocess.Popen(line, **{**pipes, **options})  # type: ignore[call-overload]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def recipe(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that runs in a moment."""
    path = tmp_path_factory.mktemp("recipes") / "quick.yaml"
    content = {
        "model": str(model),
        "calibration": {"data": "shipped", "samples": 4, "length": 32, "batch_size": 4},
        "steps": [{"gptq": {"bits": 4, "group_size": 32}}],
        "evaluation": {"data": "shipped", "length": 64, "max_tokens": 256},
    }
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def make(tmp_path: Path, text: Path) -> Callable[..., Path]:
    """`make(step, ..., output={...})`: a recipe file for a tiny model with these steps."""

    def write(*steps: dict[str, Any], family: str = "llama_gqa_tied", **fields: Any) -> Path:
        source = save_tiny(family, tmp_path / "source")
        calibration = {"data": str(text), "samples": 6, "length": 48}
        file = tmp_path / "recipe.yaml"
        file.write_text(
            yaml.safe_dump({"model": str(source), "calibration": calibration, "steps": list(steps), **fields})
        )
        return file

    return write


@pytest.fixture(scope="session")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of that recipe."""
    folder = tmp_path_factory.mktemp("results") / "quick"
    assert main(["run", "--recipe", str(recipe), "--out", str(folder), "--quiet"]) == 0
    return folder
