"""`--arithmetic`: what quantized layers run on, refused where it is none, and said where it was used."""

from __future__ import annotations

import json
import shutil

import pytest

from compress.kernels import native

SHORT = ["--prompt", "It was", "-n", 3, "--greedy"]
needs_kernels = pytest.mark.skipif(native.absent() is not None, reason=f"needs the compiled kernels: {native.absent()}")


@pytest.mark.parametrize("verb", [("generate", *SHORT), ("chat",), ("bench",), ("eval", "--tasks", "x")])
def test_what_there_is_none_of_is_refused(verb, model, compress):
    name, *options = verb
    error = compress(name, model, *options, "--arithmetic", "int4").error
    assert error == "error: --arithmetic int4: choose int8, float or reference"


def test_perplexity_is_always_exact(model, compress):
    assert "--arithmetic: is about tasks" in compress("eval", model, "--arithmetic", "float").error


@needs_kernels
def test_the_end_of_generate_says_what_was_used(finished, compress, monkeypatch):
    monkeypatch.delenv("COMPRESS_PACK")
    texts = {}
    for arithmetic in ("int8", "float", "reference"):
        answer = compress("generate", finished, *SHORT, "--arithmetic", arithmetic)
        texts[arithmetic] = answer.out
        kernels = f"({native.current_isa()} kernels, {arithmetic} activations)"
        assert (kernels in answer.err) == (arithmetic != "reference"), answer.err
    assert texts["float"] == texts["reference"]


def test_a_generation_config_that_asks_for_more_is_heeded_and_said(model, tmp_path, compress):
    folder = shutil.copytree(model, tmp_path / "model")
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text())
    plain = json.loads(compress("generate", folder, *SHORT, "-n", 12, "--json").out)
    file.write_text(json.dumps({**settings, "suppress_tokens": list(range(200))}))
    answer = compress("generate", folder, *SHORT, "-n", 12, "--json")
    assert "note: its generation_config has suppress_tokens=[0, 1, 2" in answer.err
    assert "tokens are chosen by transformers' generate" in answer.err
    assert json.loads(answer.out)["text"] != plain["text"]
