"""Error by block: nothing where models are equal, and the damaged block where one is damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress.evaluation.blocks import LOCAL_TOKENS, Distance, sampled_rows
from compress.evaluation.evaluate import evaluate
from compress.pipeline.run import Machine
from compress.recipe import Evaluation
from tests.runs import recipe_for
from tests.tiny_models import save_tiny

DAMAGED = 1  # of three blocks


def damaged(folder: Path, copy: Path, block: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a checkpoint with another down projection in one block."""
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    name = next(
        n for n in tensors if f".{block}." in n and n.endswith(("down_proj.weight", "fc2.weight", "c_proj.weight"))
    )
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def hidden_states(model: Path, reference: Path, text: Path, **options: Any) -> dict[str, Any]:
    settings = Evaluation(data=(str(text),), length=32, max_tokens=640)
    return evaluate(model, reference=reference, settings=settings, **options)["hidden_states"]


@pytest.mark.parametrize("family", ["llama_gqa_tied", "gemma2", "opt", "opt_post_norm", "gpt2", "mixtral"])
def test_a_model_has_no_error_beside_itself(family: str, text: Path, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "model")
    found = hidden_states(tmp_path / "model", tmp_path / "model", text)
    assert [row["block"] for row in found["blocks"]] == [0, 1, 2]
    for row in found["blocks"]:
        assert row["relative_error"] == row["local_relative_error"] == 0
        assert row["cosine"] == row["local_cosine"] == 1
    assert found["tokens"] == found["local_tokens"] == 640
    assert found["reason"] is None


@pytest.mark.parametrize("activation_bytes", [None, 0], ids=["memory", "disk"])
@pytest.mark.parametrize("family", ["llama_gqa_tied", "gemma2", "opt", "gpt2"])
def test_the_damaged_block_is_found(family: str, activation_bytes: int | None, text: Path, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "model")
    broken = damaged(tmp_path / "model", tmp_path / "broken", DAMAGED, lambda weight: weight.roll(1, 0))
    found = hidden_states(broken, tmp_path / "model", text, machine=Machine(activation_bytes=activation_bytes))
    before, there, after = found["blocks"]
    assert found["worst"][0] == DAMAGED
    assert before["relative_error"] == before["local_relative_error"] == after["local_relative_error"] == 0
    assert there["local_relative_error"] > 0.001
    assert there["local_cosine"] < 1
    assert there["relative_error"] == pytest.approx(
        there["local_relative_error"], rel=1e-5
    )  # nothing before it differed
    assert after["relative_error"] > 0.001  # it is carried on
    assert after["cosine"] < 1


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gpt_neox"])
def test_the_figures_are_those_of_whole_models(family: str, text: Path, tmp_path: Path) -> None:
    """Against both models in memory, which give out every block's output; the last one's only behind the final norm."""
    save_tiny(family, tmp_path / "model")
    steps = [{"rtn": {"bits": 3, "group_size": 32}}]
    result = compress.run(recipe_for(tmp_path / "model", steps, text, evaluation=False), tmp_path / "out")
    found = hidden_states(result.folder, tmp_path / "model", text)["blocks"]
    from transformers import AutoTokenizer

    ids = torch.tensor(AutoTokenizer.from_pretrained(tmp_path / "model")(text.read_text())["input_ids"])[:640].view(
        -1, 32
    )
    states = []
    for folder in (tmp_path / "model", result.folder):
        model = compress.load(folder, dtype=torch.float32)
        with torch.no_grad():
            states.append(model(ids, use_cache=False, output_hidden_states=True).hidden_states)
    for block in range(2):
        true, ours = (s[block + 1].double().flatten(0, 1) for s in states)
        assert found[block]["relative_error"] == pytest.approx(
            float(((ours - true).norm(dim=1) / true.norm(dim=1)).mean()), rel=1e-4
        )
        assert found[block]["cosine"] == pytest.approx(
            float(torch.nn.functional.cosine_similarity(ours, true).mean()), abs=1e-5
        )
    assert found[0]["local_relative_error"] == pytest.approx(found[0]["relative_error"], rel=1e-5)
    assert 0 < found[1]["local_relative_error"] < found[1]["relative_error"] * 1.5
    assert found[1]["local_relative_error"] != pytest.approx(found[1]["relative_error"], rel=1e-3)


def test_models_that_do_not_correspond_are_measured_all_the_same(text: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    save_tiny("llama", tmp_path / "deeper", num_hidden_layers=4)
    found = evaluate(
        tmp_path / "model",
        reference=tmp_path / "deeper",
        settings=Evaluation(data=(str(text),), length=32, max_tokens=320),
    )
    assert found["hidden_states"]["blocks"] == []
    assert found["hidden_states"]["reason"] == "the models have different numbers of blocks (3 and 4)"
    assert found["fidelity"]["kl_mean"] > 0


def test_a_token_with_a_huge_state_does_not_hide_the_others() -> None:
    true = torch.ones(1, 10, 8)
    true[0, 0] = 1e4
    found = true.clone()
    found[0, 1:] *= 1.1
    distance = Distance()
    distance.add(found, true)
    assert distance.to_dict()["relative_error"] == pytest.approx(0.09, rel=1e-4)
    assert distance.to_dict()["cosine"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("n_windows", "per_batch", "length"), [(187, 16, 256), (146, 2, 2048), (3, 16, 256), (1, 1, 9000)]
)
def test_the_sample_is_about_as_large_as_wanted_and_spread(n_windows: int, per_batch: int, length: int) -> None:
    shapes: list[tuple[int, ...]] = [(min(per_batch, n_windows - i), length, 8) for i in range(0, n_windows, per_batch)]
    rows = sampled_rows(shapes)
    assert all(0 <= n <= shape[0] for n, shape in zip(rows, shapes, strict=True))
    wanted = min(LOCAL_TOKENS, n_windows * length)
    assert 0.5 * wanted <= sum(rows) * length <= max(2 * wanted, length)
    assert len({n for n in rows[:-1] if n}) <= 1
    assert len(rows) == 1 or rows[0]
    taken = [batch for batch, n in enumerate(rows) if n]
    assert taken[-1] >= len(shapes) * 0.7 or len(taken) == 1
