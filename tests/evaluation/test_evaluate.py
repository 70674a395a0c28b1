"""Streamed block by block, the figures are those that whole models in memory give."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress.errors import CheckpointError, RecipeError
from compress.evaluation.evaluate import evaluate
from compress.pipeline.run import Machine
from compress.recipe import Evaluation
from tests.runs import recipe_for
from tests.tiny_models import save_tiny


def whole_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = compress.load(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(ids, use_cache=False).logits.float()


def token_ids(folder: Path, text: Path) -> torch.Tensor:
    from transformers import AutoTokenizer

    return torch.tensor(AutoTokenizer.from_pretrained(folder)(text.read_text())["input_ids"])


@pytest.mark.parametrize("activation_bytes", [None, 0], ids=["memory", "disk"])
@pytest.mark.parametrize("stride", [None, 16])
@pytest.mark.parametrize("family", ["llama_gqa_tied", "gemma2", "opt", "gpt2", "mixtral"])
def test_perplexity_is_that_of_the_whole_model(
    family: str, stride: int | None, activation_bytes: int | None, text: Path, tmp_path: Path
) -> None:
    save_tiny(family, tmp_path / "model")
    settings = Evaluation(data=(str(text),), length=32, stride=stride, max_tokens=330)
    found = evaluate(tmp_path / "model", settings=settings, machine=Machine(activation_bytes=activation_bytes))
    windows = token_ids(tmp_path / "model", text)[:330].unfold(0, 32, stride or 32)
    logits = whole_logits(tmp_path / "model", windows)
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten(), reduction="none"
    ).view(len(windows), 31)
    kept = losses.flatten() if stride is None else torch.cat([losses[0], losses[1:, -stride:].flatten()])
    assert found["model"]["scored_tokens"] == len(kept)
    assert found["model"]["perplexity"] == pytest.approx(math.exp(kept.double().mean()), rel=1e-5)
    assert found["text"]["windows"] == len(windows)
    per_byte = found["text"]["text_bytes"] / found["text"]["text_tokens"]
    assert found["model"]["bits_per_byte"] == pytest.approx(
        float(kept.double().mean()) / math.log(2) / per_byte, rel=1e-5
    )


def test_divergence_and_agreement_are_those_of_whole_models(text: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    steps = [{"rtn": {"bits": 2, "group_size": 32}}]
    result = compress.run(recipe_for(tmp_path / "model", steps, text, evaluation=False), tmp_path / "out")
    settings = Evaluation(data=(str(text),), length=32, max_tokens=330)
    found = evaluate(result.folder, reference=tmp_path / "model", settings=settings)
    windows = token_ids(tmp_path / "model", text)[:320].view(-1, 32)
    p = torch.log_softmax(whole_logits(tmp_path / "model", windows).double(), -1)
    q = torch.log_softmax(whole_logits(result.folder, windows).double(), -1)
    kl = (p.exp() * (p - q)).sum(-1).flatten()
    assert found["fidelity"]["kl_mean"] == pytest.approx(float(kl.mean()), rel=1e-4)
    assert found["fidelity"]["kl_max"] == pytest.approx(float(kl.max()), rel=1e-3)
    assert found["fidelity"]["kl_p99"] <= found["fidelity"]["kl_max"]
    assert found["fidelity"]["top1_agreement"] == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert found["fidelity"]["positions"] == len(kl)
    alone = evaluate(result.folder, settings=settings)
    assert alone["model"]["perplexity"] == pytest.approx(found["model"]["perplexity"], rel=1e-9)
    assert "fidelity" not in alone


def test_a_model_agrees_with_itself(shipped_model: Path) -> None:
    found = evaluate("shipped", reference=shipped_model, settings=Evaluation(max_tokens=600, length=200))
    assert found["fidelity"]["kl_max"] == pytest.approx(0, abs=1e-6)
    assert found["fidelity"]["top1_agreement"] == 1
    assert found["model"]["perplexity"] == found["reference"]["perplexity"]
    assert 20 < found["model"]["perplexity"] < 60  # it knows English


def test_the_published_perplexity_of_the_shipped_model(shipped_model: Path) -> None:
    """compress/data/README.md names it."""
    found = evaluate("shipped", settings=Evaluation(length=256))
    assert found["model"]["perplexity"] == pytest.approx(34.26, abs=0.05)


def wrong_vocabulary(tmp_path: Path) -> Any:
    save_tiny("llama", tmp_path / "a")
    save_tiny("llama", tmp_path / "b", vocab_size=320)
    return {"model": tmp_path / "a", "reference": tmp_path / "b"}


def too_long(tmp_path: Path) -> Any:
    save_tiny("gpt2", tmp_path / "a")
    return {"model": tmp_path / "a", "settings": Evaluation(length=257)}


def too_short(tmp_path: Path) -> Any:
    save_tiny("llama", tmp_path / "a")
    (tmp_path / "t.txt").write_text("a few words")
    return {"model": tmp_path / "a", "settings": Evaluation(data=(str(tmp_path / "t.txt"),), length=64)}


@pytest.mark.parametrize(
    ("make", "says"),
    [(wrong_vocabulary, "token by token"), (too_long, "256 positions"), (too_short, "one window needs")],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(make: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises((CheckpointError, RecipeError), match=says) as caught:
        evaluate(**make(tmp_path))
    assert "\n" not in str(caught.value)
