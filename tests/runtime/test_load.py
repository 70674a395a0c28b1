"""`compress.load` and `from_pretrained` pack what they load; what is saved again is what was loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import logging

import compress
from compress.kernels import native
from compress.runtime.prepare import arithmetic, packed_linears
from tests.runs import fingerprints, recipe_for
from tests.tiny_models import save_tiny

pytestmark = pytest.mark.skipif(native.absent() is not None, reason=f"needs the compiled kernels: {native.absent()}")
FAMILIES = ("llama_gqa_tied", "gpt2", "mixtral")
IDS = torch.arange(24).view(2, 12)


@pytest.fixture(autouse=True)
def packing(monkeypatch):
    monkeypatch.delenv("COMPRESS_PACK", raising=False)


def recipe(family: str, place: Path):
    steps = [{"gptq": {"bits": 4, "group_size": 32, "symmetric": family == "gpt2"}}]
    return recipe_for(place / "model", steps, place / "text.txt", evaluation=False)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory) -> Path:
    """A result: compressed-tensors, our own format (Conv1D), a mixture whose experts are unfused at load."""
    place = tmp_path_factory.mktemp(request.param)
    text = place / "text.txt"
    text.write_text("the old bridge under the river " * 60)
    save_tiny(request.param, place / "model")
    compress.run(recipe(request.param, place), place / "out")
    return place / "out"


@torch.no_grad()
def test_packed_when_loaded_and_plain_when_saved(folder, tmp_path, capfd):
    logging.enable_progress_bar()  # a command line that ran in this process may have turned it off
    plain = compress.load(folder, kernels="reference")
    assert packed_linears(plain) == []
    expected = plain(IDS, use_cache=False).logits
    model = compress.load(folder, activations="float")
    assert "Packing weights" in capfd.readouterr().err
    found = arithmetic(model)
    assert found["kernels"] == native.current_isa()
    assert found["activations"] == "float"
    assert 0 < found["products"] < found["linears"] or "gpt2" in str(folder)
    torch.testing.assert_close(model(IDS, use_cache=False).logits, expected, rtol=0, atol=1e-4)
    rough = compress.load(folder)
    assert arithmetic(rough)["activations"] == "int8"
    error = rough(IDS, use_cache=False).logits - expected
    assert 0 < error.norm() < 0.05 * expected.norm()

    assert list(model.state_dict()) == list(plain.state_dict())
    for name, copied in (("packed", model), ("plain", plain)):
        copied.save_pretrained(tmp_path / name)
    files = [sorted(path.name for path in (tmp_path / name).glob("*")) for name in ("packed", "plain")]
    assert files[0] == files[1]
    for file in (tmp_path / "plain").glob("*.safetensors"):
        ours, theirs = load_file(tmp_path / "packed" / file.name), load_file(file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert packed_linears(model), "saving leaves it as it was"


@torch.no_grad()
def test_from_pretrained_packs_too(folder, monkeypatch):
    if "gpt2" not in str(folder):
        return  # a folder of compressed-tensors is theirs
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert len(packed_linears(model)) == 12
    part = AutoModel.from_pretrained(folder)
    assert len(packed_linears(part)) == 12
    monkeypatch.setenv("COMPRESS_PACK", "off")
    assert packed_linears(AutoModelForCausalLM.from_pretrained(folder)) == []


def test_the_pass_does_not_depend_on_it(folder):
    """Blocks are run on dense copies there: with kernels allowed, a run writes the same bytes."""
    family = next(family for family in FAMILIES if family in folder.parent.name)
    before = fingerprints(folder)
    compress.run(recipe(family, folder.parent), folder, overwrite=True)
    assert fingerprints(folder) == before
