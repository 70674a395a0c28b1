"""The plan reads headers only, predicts the bytes exactly, and refuses what cannot work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import compress
from compress.errors import CheckpointError, RecipeError
from compress.pipeline.plan import plan
from compress.recipe import Recipe
from tests.runs import recipe_for
from tests.tiny_models import save_tiny

GPTQ = [{"gptq": {"bits": 4, "group_size": 32}}]

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


def hollow_checkpoint(folder: Path, config: dict[str, Any]) -> Path:
    """A checkpoint of the right shapes whose data are holes in sparse files: only its headers can be read quickly."""
    h, m, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": []}))
    weight_map = {}

    def shard(name: str, shapes: dict[str, list[int]]) -> None:
        header, end = {}, 0
        for tensor, shape in shapes.items():
            size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            end += size
            weight_map[tensor] = name
        encoded = json.dumps(header).encode()
        with open(folder / name, "wb") as stream:
            stream.write(len(encoded).to_bytes(8, "little") + encoded)
            stream.truncate(8 + len(encoded) + end)

    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}"
        shapes = {f"{p}.input_layernorm.weight": [h], f"{p}.post_attention_layernorm.weight": [h]}
        shapes |= {f"{p}.self_attn.{n}_proj.weight": [h if n in "qo" else kv, h] for n in "qkvo"}
        shapes |= {f"{p}.mlp.{n}_proj.weight": [m, h] for n in ("gate", "up")} | {f"{p}.mlp.down_proj.weight": [h, m]}
        shard(f"model-{i:05d}.safetensors", shapes)
    shard("rest.safetensors", {"model.embed_tokens.weight": [v, h], "model.norm.weight": [h], "lm_head.weight": [v, h]})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_a_70b_model_is_planned_from_headers_alone(text: Path, tmp_path: Path) -> None:
    folder = hollow_checkpoint(tmp_path / "70b", LLAMA_70B)
    planned = plan(recipe_for(folder, [{"gptq": {"bits": 4, "group_size": 128}}], text, evaluation=False))
    assert planned.n_weights == 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    assert planned.bits_per_weight == pytest.approx(4 + 16 / 128, rel=1e-4)
    assert planned.bytes_before == 2 * planned.n_weights
    block = 4 * planned.n_weights / 80
    assert block < planned.peak_bytes < 7 * block  # a few blocks (its widest Gram matrix alone is one), however deep
    assert planned.format == "compressed-tensors"
    assert (tmp_path / "70b" / "rest.safetensors").stat().st_blocks * 512 < 2**20  # still hollow


def test_depth_hardly_changes_the_predicted_memory(text: Path, tmp_path: Path) -> None:
    shallow = hollow_checkpoint(tmp_path / "a", {**LLAMA_70B, "num_hidden_layers": 4})
    deep = hollow_checkpoint(tmp_path / "b", {**LLAMA_70B, "num_hidden_layers": 64})
    peaks = [plan(recipe_for(f, [{"gptq": {}}], text, evaluation=False)).peak_bytes for f in (shallow, deep)]
    assert peaks[0] == peaks[1]


def test_planning_imports_no_transformers(root: Path) -> None:
    code = (
        "import sys; from compress.recipe import Recipe; from compress.pipeline.plan import plan; "
        "plan(Recipe.load('demo')); print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("family", ["llama", "llama_gqa_tied", "gpt2", "mixtral", "gemma"])
@pytest.mark.parametrize(
    "layers", [None, ["*", "lm_head"], ["model.embed_tokens", "*wte"]], ids=["blocks", "head", "table"]
)
def test_bytes_come_out_as_planned(family: str, layers: list[str] | None, text: Path, tmp_path: Path) -> None:
    """Also of what is untied, and of tables; the run itself refuses to go on where a layer differs."""
    from compress.checkpoint.headers import read_headers

    save_tiny(family, tmp_path / "model")
    step: dict[str, Any] = {"rtn": {"bits": 5, "group_size": 32}}
    if layers is not None:
        names = set(read_headers(tmp_path / "model"))
        table = "transformer.wte" if family == "gpt2" else "model.embed_tokens"
        assert f"{table}.weight" in names
        step["layers"] = [table] if "model.embed_tokens" in layers else layers
    recipe = recipe_for(tmp_path / "model", [step], text, evaluation=False)
    planned = plan(recipe)
    result = compress.run(recipe, tmp_path / "out")
    assert sum(i.nbytes for i in read_headers(result.folder).values()) == planned.bytes_total_after
    tied = family in ("llama_gqa_tied", "gpt2", "gemma")
    assert planned.untied == (tied and layers is not None)
    model = compress.load(result.folder)
    assert model.config.tie_word_embeddings == (tied and layers is None)


def test_the_reason_for_the_format_is_given(text: Path, tmp_path: Path) -> None:
    save_tiny("gpt2", tmp_path / "gpt2")
    planned = plan(recipe_for(tmp_path / "gpt2", GPTQ, text))
    assert (planned.format, "Conv1D" in planned.format_reason) == ("compress", True)
    with pytest.raises(RecipeError, match="Conv1D"):
        plan(recipe_for(tmp_path / "gpt2", GPTQ, text, output={"format": "compressed-tensors"}))
    save_tiny("llama", tmp_path / "llama")
    own = plan(recipe_for(tmp_path / "llama", GPTQ, text, output={"format": "compress"}))
    assert own.format == "compress"


def test_asymmetric_grids_are_said_to_need_an_option(text: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "llama")
    planned = plan(recipe_for(tmp_path / "llama", [{"gptq": {"symmetric": False, "group_size": 32}}], text))
    assert any("dequantize=True" in warning for warning in planned.warnings)
    symmetric = plan(recipe_for(tmp_path / "llama", GPTQ, text))
    assert not any("dequantize" in warning for warning in symmetric.warnings)


def refused(text: Path, folder: Path, **fields: Any) -> str:
    with pytest.raises((RecipeError, CheckpointError)) as caught:
        plan(Recipe.from_dict({**recipe_for(folder, GPTQ, text).to_dict(), **fields}))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_what_cannot_work_is_refused_before_anything_is_read(text: Path, tmp_path: Path) -> None:
    save_tiny("gpt2", tmp_path / "m")
    steps = [{"gptq": {"bits": 4, "group_size": 48}}]
    message = refused(text, tmp_path / "m", steps=steps)
    assert "group_size=48" in message
    assert "64" in message
    assert "256" in refused(text, tmp_path / "m", calibration={"data": str(text), "length": 300})
    assert "no_such_proj" in refused(
        text, tmp_path / "m", steps=[{"gptq": {"group_size": 32}, "layers": "*.no_such_proj"}]
    )
    assert "no layer" in refused(text, tmp_path / "m", steps=[{"gptq": {"group_size": 32}, "skip": "*"}])
    assert "calibration.data" in refused(text, tmp_path / "m", calibration={"length": 64})
    (tmp_path / "m" / "tokenizer.json").unlink()
    assert "no tokenizer" in refused(text, tmp_path / "m")
