"""Every family of the tables through the whole run: plan, compress, evaluate, load, generate, save, and load again."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import compress
from tests.runs import recipe_for
from tests.tiny_models import TINY, save_tiny

IN_OUR_FORMAT = {"gpt2", "gpt2_no_prefix"}  # Conv1D, which compressed-tensors cannot hold


@pytest.mark.parametrize("family", list(TINY))
def test_the_whole_run(family: str, text: Path, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "model")
    result = compress.run(
        recipe_for(tmp_path / "model", [{"gptq": {"bits": 4, "group_size": 32}}], text), tmp_path / "out"
    )
    assert (result.plan.format == "compress") == (family in IN_OUR_FORMAT)
    layers = {layer["name"]: layer["figures"] for layer in result.report["layers"]}
    assert layers.keys() == {n for sites in result.plan.architecture.block_sites for s in sites for n in s.linears}
    assert all(figures["relative_error"] < 0.1 for figures in layers.values() if "relative_error" in figures)
    found = result.report["evaluation"]
    assert found["fidelity"]["kl_mean"] < 0.3

    model = compress.load(tmp_path / "out", dtype=torch.float32)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = torch.tensor(tokenizer(text.read_text())["input_ids"])[:480].view(-1, 48)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits.float()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert math.exp(loss) == pytest.approx(found["model"]["perplexity"], rel=1e-4)
    assert model.generate(ids[:1, :8], max_new_tokens=3, do_sample=False).shape == (1, 11)

    model.save_pretrained(tmp_path / "copy")
    copy = compress.load(tmp_path / "copy", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(copy(ids, use_cache=False).logits.float(), logits)
