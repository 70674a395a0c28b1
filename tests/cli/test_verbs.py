"""The verbs that run nothing: plan, eval, generate, inspect, methods, recipes, doctor."""

from __future__ import annotations

import importlib
import io
import json
import shutil
import subprocess
import sys

import jsonschema
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from compress import shipped
from compress.cli import doctor
from compress.methods import METHODS

# ---- plan


def test_plan_says_what_a_run_finds(recipe, finished, compress):
    planned = json.loads(compress("plan", "--recipe", recipe, "--json").out)
    report = json.loads((finished / "compress_report.json").read_text())
    for key in ("bytes_before", "bytes_after", "bytes_total_after", "format", "bits_per_weight", "stages"):
        assert planned[key] == report[key]


def test_plan_lists_layers_of_a_kind_or_each(recipe, compress):
    answer = compress("plan", "--recipe", recipe)
    assert answer.code == 0
    assert "model.layers.[0-2].self_attn.q_proj" in answer.out
    assert "quantized bits=4 group_size=32" in answer.out
    assert "bits per weight" in answer.out
    assert "peak memory" in answer.out
    assert "compressed-tensors: every replaced module" in answer.out
    each = compress("plan", "--recipe", recipe, "--layers").out
    assert sum(line.startswith("model.layers.") for line in each.splitlines()) == 21


def test_plan_does_not_import_transformers():
    program = (
        "import sys; from compress.cli.main import main; assert main(['plan', '--recipe', 'demo']) == 0; "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_plan_warns_on_stderr(recipe, compress):
    answer = compress("plan", "--recipe", recipe, "--set", "steps.0.gptq.symmetric=false")
    assert answer.err.startswith("warning: asymmetric grids")


# ---- eval


def test_eval_says_what_it_measured_on(finished, model, compress):
    options = ["--reference", model, "--length", 64, "--stride", 32, "--max-tokens", 200]
    found = json.loads(compress("eval", finished, *options, "--json", "--quiet").out)
    assert found["text"]["stride"] == 32
    answer = compress("eval", finished, *options)
    assert f"{found['model']['perplexity']:.4f}" in answer.out
    assert f"{found['reference']['perplexity']:.4f}" in answer.out
    for word in (
        "per token",
        "bits per byte",
        "KL to the original",
        "windows of 64 every 32",
        "no BOS",
        "tokens of shipped",
    ):
        assert word in answer.out
    assert "evaluate quick" in answer.err
    assert "KL" not in compress("eval", model, *options[2:]).out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["/no/such/model"], "/no/such/model: no such model folder"),
        (["shipped", "--length", "1"], "--length: should be greater"),
        (["shipped", "--length", "512"], "--length: 512 tokens, but the model has 256 positions"),
        (["shipped", "--max-tokens", "1"], "--max-tokens: should be greater"),
        (["shipped", "--length", "64", "--stride", "65"], "stride 65"),
        (["shipped", "--data", "nowhere.txt"], "--data: no file 'nowhere.txt'; check the path, or use --data shipped"),
        (["shipped", "--device", "tpu"], "--device tpu"),
        (["shipped", "--reference", "/no/such"], "/no/such: no such model folder"),
    ],
)
def test_eval_refuses_in_one_line(options, words, compress):
    assert words in compress("eval", *options).error


# ---- generate


def test_generate_prints_prompt_and_continuation_and_a_seed_repeats_it(finished, compress):
    line = ["generate", finished, "--prompt", "It was", "--max-new-tokens", 8, "--temperature", 1.0]
    answer = compress(*line)
    assert answer.code == 0
    assert answer.out.startswith("It was")
    assert "tokens in" in answer.err
    again = json.loads(compress(*line, "--json", "--quiet").out)
    assert again["prompt"] + again["text"] == answer.out.rstrip("\n")
    assert json.loads(compress(*line, "--seed", 1, "--json").out)["text"] != again["text"]


def test_greedy_is_temperature_zero(model, compress):
    line = ["generate", model, "--prompt", "It was", "--max-new-tokens", 4, "--json", "--quiet"]
    assert json.loads(compress(*line, "--greedy").out)["text"] == json.loads(compress(*line, "-t", 0).out)["text"]


def test_a_prompt_may_come_from_stdin(model, compress, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("It was"))
    found = json.loads(compress("generate", model, "--prompt", "-", "-n", 2, "--json").out)
    assert found["prompt"] == "It was"
    assert found["new_tokens"] <= 2


def test_a_chat_template_makes_the_prompt_a_message(model, tmp_path, compress):
    folder = shutil.copytree(model, tmp_path / "chat")
    written = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    template = written + "{% if add_generation_prompt %}<assistant>{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    line = ["generate", folder, "--prompt", "Hello", "-n", 4, "--greedy", "--json", "--quiet"]
    chat = json.loads(compress(*line).out)
    assert chat["chat"]
    assert chat["text"] == json.loads(compress(*line[:3], "<user>Hello<assistant>", *line[4:], "--no-chat").out)["text"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt", ""], "--prompt: is empty"),
        (["--prompt", "x" * 300], "--prompt: has 300 tokens, the model 256 positions"),
        (["--prompt", "x", "--chat"], "has no chat template"),
        (["--prompt", "x", "--greedy", "--temperature", "0.5"], "choose one"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature"),
        (["--prompt", "x", "--device", "tpu"], "--device tpu"),
    ],
)
def test_generate_refuses_in_one_line(options, words, model, compress):
    assert words in compress("generate", model, *options).error


# ---- inspect


def test_inspect_counts_every_byte(finished, compress):
    found = json.loads(compress("inspect", finished, "--json").out)
    report = json.loads((finished / "compress_report.json").read_text())
    assert found["format"] == "compressed-tensors"
    assert found["bytes_total"] == report["bytes_total_after"] == sum(layer["nbytes"] for layer in found["layers"])
    assert found["bytes_replaced"] == report["bytes_after"]
    assert found["bits_per_weight_replaced"] == pytest.approx(report["bits_per_weight"])
    methods = {layer["name"]: layer["method"] for layer in found["layers"]}
    assert methods["model.layers.0.mlp.down_proj"] == "gptq"
    assert methods["model.norm"] is None


def test_inspect_names_methods_by_the_recipe_if_there_is_no_report(finished, tmp_path, compress):
    folder = shutil.copytree(finished, tmp_path / "copy")
    (folder / "compress_report.json").unlink()
    assert "gptq" in compress("inspect", folder).out
    (folder / "recipe.yaml").unlink()
    assert "not recorded" in compress("inspect", folder).out


def test_inspect_shows_layers_blocks_and_totals(finished, compress):
    answer = compress("inspect", finished)
    for word in (
        "model.layers.[0-2].self_attn.q_proj",
        "quantized bits=4",
        "blocks 0-2",
        "21 compressed layers",
        "all files",
    ):
        assert word in answer.out
    each = compress("inspect", finished, "--layers").out
    assert sum("self_attn.q_proj" in line for line in each.splitlines()) == 3
    names = [line.split()[0] for line in each.splitlines() if line]
    assert names.index("model.layers.0.self_attn.q_proj") < names.index("model.layers.0.mlp.down_proj")
    assert names.index("model.layers.0.mlp.down_proj") < names.index("model.layers.1.self_attn.q_proj")


def test_inspect_needs_no_torch():
    program = (
        "import sys; from compress.cli.main import main; assert main(['inspect', 'shipped']) == 0; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_inspect_shows_what_it_does_not_understand(model, tmp_path, compress):
    folder = shutil.copytree(model, tmp_path / "foreign")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"], config["quantization_config"] = "no-such", {"quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))
    answer = compress("inspect", folder)
    assert answer.code == 0
    assert "model.layers.[0-2].self_attn.q_proj" in answer.out
    assert answer.err.count("note: ") == 2


def test_check_finds_values_that_are_no_numbers(model, tmp_path, compress):
    assert compress("inspect", model, "--check").code == 0
    folder = shutil.copytree(model, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    answer = compress("inspect", folder, "--check", "--json", "--quiet")
    assert answer.code == 1
    assert json.loads(answer.out)["check"]["not_finite"] == [name]
    assert name in answer.err


# ---- methods, recipes


def test_methods_lists_all_and_shows_one(compress):
    listed = json.loads(compress("methods", "--json").out)
    assert [method["name"] for method in listed][: len(METHODS)] == list(METHODS)
    for method in listed[: len(METHODS)]:
        assert method["package"] == "compress-llm"
        assert all(setting["description"] for setting in method["settings"].values())
        answer = compress("methods", method["name"])
        assert all(setting in answer.out for setting in method["settings"])
    bits = json.loads(compress("methods", "gptq", "--json").out)["settings"]["bits"]
    assert (bits["range"], bits["default"], bits["type"]) == (">= 2, <= 8", 4, "whole number")
    assert "did you mean 'gptq'?" in compress("methods", "gtpq").error


def test_methods_of_other_packages_are_listed_and_broken_ones_do_not_hide_them(tmp_path, monkeypatch, compress):
    (tmp_path / "outside.py").write_text("from compress.methods.rtn import RTN\nclass Mine(RTN):\n    name = 'mine'\n")
    info = tmp_path / "outside_methods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-methods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[compress.methods]\nmine = outside:Mine\nbroken = outside:Nothing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    answer = compress("methods")
    assert "outside-methods" in next(line for line in answer.out.splitlines() if line.startswith("mine"))
    assert "warning: method 'broken' of outside-methods" in answer.err


def test_recipes_lists_all_and_prints_one(compress):
    listed = json.loads(compress("recipes", "--json").out)
    assert {entry["name"] for entry in listed} == set(shipped.recipes())
    assert all(entry["summary"] for entry in listed)
    text = compress("recipes", "demo").out
    assert text.rstrip() == shipped.recipes()["demo"].read_text().rstrip()
    assert json.loads(compress("recipes", "demo", "--json").out)["model"]["path"] == "shipped"
    assert "did you mean 'demo'?" in compress("recipes", "demmo").error


def test_the_schema_takes_the_shipped_recipes(compress):
    schema = json.loads(compress("recipes", "--schema").out)
    for path in shipped.recipes().values():
        jsonschema.validate(yaml.safe_load(path.read_text()), schema)


# ---- doctor


def test_doctor_finds_this_machine_fit(compress):
    answer = compress("doctor")
    assert answer.code == 0
    for word in ("python", "torch", "transformers", "devices", "memory", "disk", "hub", "kernels", "shipped model"):
        assert word in answer.out
    found = json.loads(compress("doctor", "--json").out)
    assert found["ok"]
    hub = next(finding for finding in found["findings"] if finding["what"] == "hub")
    assert hub["found"] == "offline by HF_HUB_OFFLINE"


def test_doctor_says_what_is_missing_and_how_to_get_it(compress, monkeypatch):
    wanted = [*doctor.requirements(), "no-such-distribution>=2", "rich<1"]
    monkeypatch.setattr(doctor, "requirements", lambda: wanted)
    answer = compress("doctor")
    assert answer.code == 1
    assert "pip install 'no-such-distribution>=2'" in answer.out
    assert "outside <1" in answer.out
    assert answer.err == "error: missing: no-such-distribution\n"


def test_doctor_waits_for_nobody(monkeypatch):
    monkeypatch.setattr(doctor, "HUB_SECONDS", 0.01)
    assert doctor._unreachable("http://127.0.0.1:9") is not None
