"""The public ARMOR code, run as it stands in a checkout. What its files import to draw, to log and to read settings is replaced:
settings are plain dictionaries here, and nothing is drawn or logged. The arithmetic is theirs to the letter.
"""

from __future__ import annotations

import importlib
import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

REPLACED = {
    "wandb": (), "hydra": (), "matplotlib": (), "matplotlib.pyplot": (), "omegaconf": ("DictConfig", "OmegaConf", "open_dict"),
    "hydra.utils": ("instantiate",),
}  # fmt: skip


class Settings(dict[str, Any]):
    """A dictionary whose entries are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        return self[name]

    def __delattr__(self, name: str) -> None:
        del self[name]


def armor(
    folder: Path, weight: Tensor, squares: Tensor, block_size: int, n_iters: int, learning_rate: float = 1e-4
) -> Tensor:
    """A S B before it is scaled back, [out, in]: their approximation of the normalised weight, with the settings they ship.

    Args:
        folder: a checkout.
        weight: [out, in]; squares: mean of each input's square [in].
    """
    optimizer = {"_target_": "torch.optim.Adam", "lr": learning_rate}
    training = {
        "_target_": "src.ARMOR_compress.TrainingConfig", "n_iters": n_iters, "n_continous_updates_per_iter": 1,
        "n_sparse_core_updates_per_iter": 1, "sparse_core_step_select": "gradient_all_random", "loss_atol": 1e-8,
        "loss_rtol": 1e-6, "overall_patience": 100, "log_freq": 10**9,
    }  # fmt: skip
    start = {
        "init_config": Settings(_target_="src.sparse_compress.SparseLinear"),
        "compression_config": {
            "frac_nonzero": 0.5,
            "pattern": (2, 4),
            "normalizer_kwargs": {"norm_order": [], "zero": [False, False], "p": 2},
        },
    }
    code = code_of(folder)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        linear = code.ARMOR_Linear(weight.clone())
        linear.enable_hessianDiag_logging(hessianDiag=squares.clone())
        linear.compress(
            naive_compression_config=Settings(start),
            block_diagonal_config=Settings(block_size=block_size, importance_weight="hessianDiag"),
            optimizer_config=Settings(optimizer),
            training_config=Settings(training),
            normalizer_kwargs={"norm_order": [0, 1], "zero": [False, False], "p": 2},
        )
        with torch.no_grad():
            return linear.reconstruct_(denormalize=False).detach()


def _instantiate(config: dict[str, Any], **arguments: Any) -> Any:
    """What Hydra makes of settings with a `_target_`."""
    module, _, name = config["_target_"].rpartition(".")
    kept = {key: value for key, value in config.items() if key != "_target_"}
    return getattr(importlib.import_module(module), name)(**kept, **arguments)


@cache
def code_of(folder: Path) -> ModuleType:
    """Their module, imported once."""
    for module, names in REPLACED.items():
        made: Any = ModuleType(module)
        for name in names:
            setattr(made, name, _instantiate if name == "instantiate" else Settings)
        sys.modules[module] = made
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("src.ARMOR_compress")
    finally:
        sys.path.remove(str(folder))
        for module in REPLACED:
            del sys.modules[module]
