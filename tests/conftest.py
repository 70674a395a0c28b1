"""What tests share: threads held down, no network, and the folders of models and texts that lie outside the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the workers of pytest-xdist share the cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a network
os.environ["HF_DATASETS_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("COMPRESS_SHARED") or ROOT.parent / "shared")


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared(request: pytest.FixtureRequest) -> Path:
    """The folder of models and texts that are too large for the repository; `shared/models`, `shared/data`."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder {SHARED} with models and texts (set COMPRESS_SHARED): not run: {request.node.nodeid or 'this'}")
    return SHARED


@pytest.fixture(scope="session")
def shipped_model() -> Path:
    """The model that comes with the package."""
    from compress import shipped

    return shipped.model_path()


@pytest.fixture(scope="session")
def shipped_tokenizer(shipped_model: Path):
    from compress.calibration.data import load_tokenizer

    return load_tokenizer(shipped_model)
