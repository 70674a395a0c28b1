"""What a run writes, stock transformers with compressed-tensors loads: the same weights bit for bit, the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress.modules.base import CompressedModule
from tests.runs import recipe_for

STEPS = {
    "demo": [{"gptq": {"bits": 4, "group_size": 64, "clip": "mse"}}],
    "three bits per row": [{"gptq": {"bits": 3, "group_size": -1, "order": "gar"}}],
    "mixed": [{"gptq": {"bits": 4, "group_size": 128}, "overrides": {"*.down_proj": {"bits": 8}}, "skip": "*.0.*"}],
    "head": [{"rtn": {"bits": 8, "group_size": 32}, "layers": ["*", "lm_head"]}],
    "asymmetric": [{"gptq": {"bits": 4, "group_size": 64, "symmetric": False}}],
}


def dense_twin(folder: Path, twin: Path) -> Path:
    """The same model, its compressed modules replaced by plain linears with the weights they stand for."""
    model = compress.load(folder)
    for name, module in list(model.named_modules()):
        if isinstance(module, CompressedModule):
            out_features, in_features = module.dense().shape
            linear = torch.nn.Linear(in_features, out_features, bias=False, dtype=model.dtype)
            linear.weight.data = module.dense()
            model.set_submodule(name, linear)
    plain = type(model)(model.config)
    plain.to(model.dtype).load_state_dict(model.state_dict())
    del plain.config.quantization_config
    plain.save_pretrained(twin)
    return twin


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", STEPS)
def test_stock_loads_what_a_run_writes(kind: str, dtype: str, stock: Any, text: Path, tmp_path: Path) -> None:
    recipe = recipe_for(Path("shipped"), STEPS[kind], text, evaluation=False)
    recipe = recipe.from_dict({**recipe.to_dict(), "model": {"path": "shipped", "dtype": dtype}, "evaluation": False})
    result = compress.run(recipe, tmp_path / "out")
    assert result.plan.format == "compressed-tensors"
    twin = dense_twin(result.folder, tmp_path / "twin")
    [answer] = stock({"do": "compare", "folder": result.folder, "twin": twin, "dequantize": kind == "asymmetric"})
    assert answer.get("error") is None
    assert answer["weights"] == []
    assert answer["logits"] < 1e-4
    card = (result.folder / "README.md").read_text()
    assert ("CompressedTensorsConfig(dequantize=True)" in card) == (kind == "asymmetric")
