from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from tests.checkpoint.conftest import stock as stock
from tests.checkpoint.folders import Folder, in_blocks, quantize_folder
from tests.tiny_models import byte_tokenizer, save_tiny

IDS = torch.arange(2 * 24).view(2, 24)


@dataclass(frozen=True)
class Made:
    """A compressed model and its exports."""

    folder: Folder
    root: Path

    @property
    def path(self) -> Path:
        return self.folder.path

    def export(self, format_: str, **options: Any) -> Path:
        """Made once."""
        out = self.root / f"{self.path.name}-{format_}"
        if not out.exists():
            compress.export(self.path, format_, out, **options)
        return out


def all_linears(name: str, site: Any) -> bool:
    return site.kind != "embedding"


def some_skipped(name: str, site: Any) -> bool:
    return in_blocks(name, site) and "o_proj" not in name and not ("layers.1." in name and "down_proj" in name)


def mixed_bits(name: str) -> int:
    return 8 if "down_proj" in name else 4


# name -> (family, how it is quantized)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama4": ("llama", {}),
    "llama2": ("llama", {"bits": 2}),
    "llama3": ("llama", {"bits": 3}),
    "llama8": ("llama", {"bits": 8}),
    "asymmetric4": ("llama", {"symmetric": False}),
    "asymmetric3": ("llama", {"bits": 3, "symmetric": False}),
    "asymmetric2": ("llama", {"bits": 2, "symmetric": False}),
    "asymmetric8": ("llama", {"bits": 8, "symmetric": False}),
    "rows": ("llama", {"group_size": -1}),
    "skipped": ("llama", {"select": some_skipped}),
    "mixed": ("llama", {"bits": mixed_bits}),
    "head": ("llama", {"select": all_linears}),
    "biases_tied": ("llama_gqa_tied", {}),
    "head_untied": ("llama_gqa_tied", {"select": all_linears}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {}),
    "opt": ("opt", {}),
    "gpt_neox": ("gpt_neox", {}),
    "phi3": ("phi3", {}),
    "mixtral": ("mixtral", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe_all": ("qwen3_moe:all", {}),
    "gpt2": ("gpt2", {"own": True}),
    "gpt2_no_prefix": ("gpt2_no_prefix", {"own": True}),
    "float32": ("llama", {"dtype": torch.float32}),
}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Compressed tiny models by name, made once, with bfloat16 scales that float16 holds exactly."""
    root = tmp_path_factory.mktemp("export")
    sources: dict[str, Path] = {}
    models: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in models:
            family, how = MODELS[name]
            if family not in sources:
                kind, _, variant = family.partition(":")
                changed = {"mlp_only_layers": []} if variant else {}
                sources[family] = save_tiny(
                    kind, root / "sources" / family.replace(":", "_"), tokenizer=False, **changed
                )
            settings = {"bits": 4, "group_size": 32, "dtype": torch.bfloat16, **how}
            folder = quantize_folder(sources[family], root / name, **settings)
            byte_tokenizer().save_pretrained(folder.path)
            models[name] = Made(folder, root)
        return models[name]

    return get


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return compress.load(folder)(IDS).logits
