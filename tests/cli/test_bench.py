"""`compress bench`: two models in turns, what is said of one alone, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.tiny_models import save_tiny

QUICK = ["--prompt-tokens", 24, "--new-tokens", 4, "--repeats", 3, "--batch-size", 2]


def test_a_result_beside_its_original(model, finished, compress):
    answer = compress("bench", finished, "--reference", model, *QUICK, "--json", "--quiet")
    assert answer.code == 0, answer.err
    assert answer.err == ""
    found = json.loads(answer.out)
    assert found["settings"] == {"prompt_tokens": 24, "new_tokens": 4, "batch_size": 2, "repeats": 3}
    for role, folder in (("model", finished), ("reference", model)):
        timed = found[role]
        assert timed["path"] == str(folder)
        for phase in ("prefill", "decode"):
            speed = timed[phase]
            assert len(speed["rounds"]) == 3
            assert 0 < speed["min"] == min(speed["rounds"]) <= speed["tokens_per_second"] <= speed["max"]
        assert timed["bytes_of_weight_files"] == sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        assert timed["bytes_in_memory"] < timed["bytes_of_weight_files"]  # less their headers
        assert 0 < timed["resident_bytes_before"] <= timed["peak_resident_bytes"]
        assert timed["load_seconds"] > 0
        assert timed["peak_cuda_bytes"] is None
    assert found["model"]["bytes_in_memory"] < found["reference"]["bytes_in_memory"]
    for phase in ("prefill", "decode"):
        pairs = zip(found["model"][phase]["rounds"], found["reference"][phase]["rounds"], strict=True)
        assert found["ratio"][phase] == pytest.approx(1 / sorted(b / a for a, b in pairs)[1])
    assert found["machine"]["device"] == "cpu"
    assert found["machine"]["dtype"] == "float32"
    assert found["machine"]["threads"] >= 1


def test_alone_nothing_is_said_about_being_quicker(model, finished, compress, monkeypatch):
    """(What is timed of one model is what is timed of two.)"""
    asked = {}

    def alone(*models, settings, **others):
        asked.update(others, models=models, settings=settings)
        rate = {"tokens_per_second": 1234.5, "min": 1000.0, "max": 2000.0, "rounds": [1234.5]}
        return {
            "settings": {"prompt_tokens": 24, "new_tokens": 4, "batch_size": 2, "repeats": 1},
            "machine": {
                "device": "cpu", "device_name": "a CPU", "threads": 2, "dtype": "float32", "attention": "sdpa", "torch": "2",
            },
            "model": {
                "path": "x", "load_seconds": 0.5, "bytes_of_weight_files": 2**21, "bytes_in_memory": 2**20, "prefill": rate,
                "decode": rate, "peak_resident_bytes": 2**29, "resident_bytes_before": 2**28, "peak_cuda_bytes": None,
            },
        }  # fmt: skip

    monkeypatch.setattr("compress.evaluation.speed.measure_speed", alone)
    answer = compress("bench", finished, *QUICK)
    assert asked["models"] == (str(finished),)
    assert asked["reference"] is None
    assert asked["settings"].batch_size == 2
    for words in (
        "prefill, tokens per second",
        "1,234 [1,000–2,000]",
        "24 tokens x 2 in one forward",
        "2 threads, float32",
    ):
        assert words in answer.out
    assert "original" not in answer.out
    assert f"alone, these say nothing about being quicker or slower: add --reference {model}" in answer.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt-tokens", 250], "use at most 192"),
        (["--new-tokens", 256], "--new-tokens 256: {model} has 256 positions"),
        (["--dtype", "int4"], "--dtype int4"),
        (["--device", "gpu"], "--device gpu"),
        (["--reference", "/no/such/model"], "/no/such/model: no such model folder"),
        (["--repeats", 0], "--repeats"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(options, words, model, compress):
    assert words.format(model=model) in compress("bench", model, *options).error


def test_what_goes_wrong_in_the_other_process_is_one_line_too(tmp_path, compress):
    folder = save_tiny("llama", tmp_path / "model")
    wider = save_tiny("llama", tmp_path / "wider", intermediate_size=160)
    shutil.copy(wider / "model.safetensors", folder / "model.safetensors")
    answer = compress("bench", folder, "--prompt-tokens", 8, "--quiet")
    assert answer.code == 1
    assert "model" in answer.error
