"""cur as a user meets it: what plan and report say, where it is refused, and what loads and can be saved again."""

from __future__ import annotations

import json

import pytest
import torch

from tests.tiny_models import save_tiny


@pytest.fixture
def make(tmp_path, text):
    """A recipe file for a tiny model with the steps given."""
    source = save_tiny("llama_gqa_tied", tmp_path / "source")

    def write(*steps, **fields):
        recipe = {
            "model": str(source),
            "calibration": {"data": str(text), "samples": 6, "length": 48},
            "steps": list(steps),
            **fields,
        }
        file = tmp_path / "recipe.yaml"
        file.write_text(json.dumps(recipe))  # JSON is YAML
        return file

    return write


def test_plan_knows_ranks_and_bytes_without_weights(make, compress):
    planned = json.loads(compress("plan", "--recipe", make({"cur": {"keep_ratio": 0.5}}), "--json").out)
    assert planned["format"] == "compress"
    ranks = {layer["name"].rpartition(".")[2]: layer["spec"]["rank"] for layer in planned["layers"]}
    assert ranks == {
        "q_proj": 14, "k_proj": 9, "v_proj": 9, "o_proj": 14, "gate_proj": 19, "up_proj": 19, "down_proj": 19,
    }  # fmt: skip
    sizes = 2 * (14 * 128 + 14**2) + 2 * (9 * 96 + 9**2) + 3 * (19 * 192 + 19**2)
    assert planned["bytes_after"] == 3 * 4 * sizes
    assert "cur rank=14" in compress("plan", "--recipe", make({"cur": {"keep_ratio": 0.5}})).out


def test_a_later_step_decides_what_ranks_are_multiples_of(make, compress):
    steps = (
        {"cur": {"keep_ratio": 0.5}, "layers": "*.q_proj"},
        {"gptq": {"bits": 4, "group_size": 8}, "layers": "*.q_proj"},
    )
    planned = json.loads(compress("plan", "--recipe", make(*steps), "--json").out)
    spec = planned["layers"][0]["spec"]
    assert spec["rank"] == 8
    assert all(spec[leaf]["group_size"] == 8 for leaf in ("rows", "link", "columns"))


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"cur": {"rank": 0}}, "greater than or equal to 1"),
        ({"cur": {"rank": 33}}, "would hold 1.30 times the numbers of the 64 x 64 weight; use rank=26 or less"),
        ({"cur": {"rank": 65}}, "use rank=26 or less"),
        ({"cur": {"rank": 8, "energy": 0.9}}, "two ways to set a rank"),
        ({"cur": {"matrix": "wandaa"}}, "matrix"),
        ({"cur": {"matrix": "wanda"}}, "looks at the outputs, not at |W|; use selection=deim for matrix=wanda"),
        ({"cur": {}, "layers": ["lm_head", "model.embed_tokens"]}, "cur is for linears, not for tables"),
    ],
)
def test_what_cannot_be_is_refused_in_the_plan_in_one_line(make, compress, step, said):
    assert said in compress("plan", "--recipe", make(step)).error


def test_blocks_that_cannot_be_chosen_end_the_run_in_one_line(make, compress, tmp_path):
    recipe = make({"cur": {"n_blocks": 2}})
    planned = json.loads(compress("plan", "--recipe", recipe, "--json").out)
    assert any("settles 21 layers once it has seen the whole model" in warning for warning in planned["warnings"])
    answer = compress("run", "--recipe", recipe, "--out", tmp_path / "out", "--quiet")
    assert "cur: n_blocks=2, but 1 blocks can be chosen" in answer.error


def test_report_names_the_blocks_and_the_result_loads_evaluates_and_generates(make, compress, tmp_path, text):
    recipe = make({"cur": {"n_blocks": 1, "energy": 0.7, "selection": "deim", "heal": 1.0}, "layers": "*.gate_proj"})
    report = json.loads(compress("run", "--recipe", recipe, "--out", tmp_path / "out", "--json", "--quiet").out)
    assert [layer["name"] for layer in report["layers"]] == ["model.layers.1.mlp.gate_proj"]
    assert any("n_blocks=1: blocks 1 turn their hidden states less" in warning for warning in report["warnings"])
    assert "cur" in compress("inspect", tmp_path / "out").out
    assert compress("generate", tmp_path / "out", "--prompt", "the old", "--max-new-tokens", "4").code == 0
    found = json.loads(
        compress("eval", tmp_path / "out", "--data", text, "--max-tokens", "96", "--length", "48", "--json").out
    )
    assert found["model"]["perplexity"] > 1


def test_save_pretrained_and_back(make, compress, tmp_path):
    import transformers

    import compress as package

    recipe = make({"cur": {"keep_ratio": 0.7}}, {"rtn": {"bits": 8, "group_size": 4}, "layers": "*.down_proj"})
    compress("run", "--recipe", recipe, "--out", tmp_path / "out", "--quiet")
    model = package.load(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    for again in (
        package.load(tmp_path / "again"),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again"),
    ):
        ids = torch.arange(3, 43)[None]
        with torch.no_grad():
            assert torch.equal(again(ids).logits, model(ids).logits)
        layer = again.get_submodule("model.layers.0.mlp.down_proj")
        assert type(layer).__name__ == "CURLinear" and type(layer.link).__name__ == "QuantizedLinear"
