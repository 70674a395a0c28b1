"""What ships inside the package: a small trained model, two samples of text, and recipes.

`shipped`, as the path of a model or the name of a data set, stands for these.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

NAME = "shipped"


def _package() -> Path:
    return Path(str(resources.files("compress")))


def model_path() -> Path:
    """A Llama of 6.2 M parameters, trained for this project: see the README.md in the folder."""
    return _package() / "data" / "novels6m"


def calibration_text_path() -> Path:
    """Excerpts of English novels, for statistics of activations."""
    return _package() / "data" / "calibration.txt"


def heldout_text_path() -> Path:
    """Other excerpts, for perplexity."""
    return _package() / "data" / "heldout.txt"


def recipes_path() -> Path:
    """The folder of recipes: inside an installed package, beside the package in a checkout."""
    inside = _package() / "recipes"
    return inside if inside.is_dir() else _package().parent / "recipes"


def recipes() -> dict[str, Path]:
    """Shipped recipes by name, sorted."""
    return {path.stem: path for path in sorted(recipes_path().glob("*.yaml"))}


def recipe_summary(path: Path) -> str:
    """What a recipe gives: the comment that it begins with, on one line."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    return " ".join(filter(None, lines))
