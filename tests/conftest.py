"""What tests share: threads held down, no network, and the models and texts that lie outside the repository."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.hub_server import HubServer

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the workers of pytest-xdist share the cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("COMPRESS_PACK", "off")  # loaded models run on the references, bit for bit
os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a network
os.environ["HF_DATASETS_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("COMPRESS_SHARED") or ROOT.parent / "shared")


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of models and texts that are too large for the repository: `models/`, `data/`."""
    if not SHARED.is_dir():
        pytest.skip(f"needs models and texts from {SHARED}, which is not there; name the folder in COMPRESS_SHARED")
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


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with 4000 words of twelve, in seeded random order."""
    picks = random.Random(0)
    words = ["stone", "river", "under", "the", "old", "a", "bridge", "went", "slowly", "light", "and", "never"]
    paragraphs = [" ".join(picks.choice(words) for _ in range(80)) for _ in range(50)]
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join(paragraphs))
    return file


@pytest.fixture(scope="session", autouse=True)
def painted() -> Iterator[Callable[..., str]]:
    """Every run paints the plots of its page, and matplotlib lays them out and writes them only where a test looks at them
    (`drawn`): that takes as long as the rest of a small run. Gives what draws them."""
    from compress.report import plots

    whole = plots._svg

    def only_painted(paint: Callable[..., None], width: float, height: float, label: str) -> str:
        from matplotlib.figure import Figure

        paint(Figure(figsize=(width, height)), width)
        return f'<svg role="img" aria-label="{escape(label)}"></svg>'

    plots._svg = only_painted
    yield whole
    plots._svg = whole


@pytest.fixture
def drawn(painted: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots are drawn."""
    monkeypatch.setattr("compress.report.plots._svg", painted)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on this machine that the real client talks to, with an empty cache and without a token."""
    from tests.hub_server import HubServer, connect

    with HubServer() as server:
        connect(server, tmp_path / "hub", monkeypatch)
        yield server
