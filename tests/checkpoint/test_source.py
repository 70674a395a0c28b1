"""A model is found, or the error says what is there instead and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from compress.checkpoint.source import HubErrors, Source, find_source, tokenizer_size
from compress.errors import CheckpointError
from tests.tiny_models import byte_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    return tmp_path


def test_a_folder(folder: Path) -> None:
    source = find_source(str(folder))
    assert (source.folder, source.config, list(source.infos)) == (folder, {"model_type": "llama"}, ["a"])
    assert source.fetch() == folder
    assert not source.has_tokenizer
    assert tokenizer_size(source) is None


def test_the_shipped_model() -> None:
    source = find_source("shipped")
    assert source.has_tokenizer
    assert tokenizer_size(source) == source.config["vocab_size"]


def test_a_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_source(f"~/{folder.name}").folder == folder


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/no/such/folder", "no such model folder"),
        ("./gone", "no such model folder"),
        ("gpt2", "no such model folder .*owner/name"),
        ("a/b/c", "no such model folder"),
        ("owner/na me", "no name that a model on the Hub can have; check the path"),
        ("owner/name", "the Hub cannot be reached .*; check the network, or download it elsewhere"),
    ],
)
def test_a_model_that_is_not_there(path: str, says: str) -> None:
    with pytest.raises(CheckpointError, match=says) as caught:
        find_source(path)
    assert str(caught.value).startswith(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, r"no model\.safetensors and no .*index\.json"),
        ({"pytorch_model.bin": ""}, "pickle can run code"),
        ({"x.gguf": ""}, "GGUF"),
        ({"model.safetensors": ""}, r"no config\.json in it; name the folder"),
        ({"config.json": "{}"}, r"no model\.safetensors"),
        ({"config.json": "{}", "model-00001-of-00002.safetensors": ""}, r"no model\.safetensors"),
    ],
)
def test_a_folder_that_is_no_model(files: dict[str, str], says: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=says):
        find_source(str(tmp_path))


def test_a_file(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file; name the folder"):
        find_source(str(folder / "model.safetensors"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("RepositoryNotFoundError", "no such model on the Hub"),
        ("GatedRepoError", "access is gated; accept its licence .*hf auth login"),
        ("RevisionNotFoundError", "no such revision"),
        ("EntryNotFoundError", "no safetensors weights"),
        ("LocalEntryNotFoundError", "cannot be reached .*check the network"),  # offline: also an EntryNotFoundError
        ("OfflineModeIsEnabled", "cannot be reached .*check the network"),
    ],
)
def test_what_the_hub_says(name: str, says: str) -> None:
    from huggingface_hub import errors

    kind = getattr(errors, name)
    error = kind.__new__(kind)  # their constructors want a response
    with pytest.raises(CheckpointError, match=f"^owner/name: .*{says}"), HubErrors("owner/name"):
        raise error


def with_tokenizer(folder: Path, change: Any) -> Source:
    byte_tokenizer().save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return find_source(str(folder))


def test_the_size_of_a_tokenizer(folder: Path) -> None:
    """The vocabulary counts. Added tokens do not: Gemma 3 has one for images that its text model has no row for."""
    assert tokenizer_size(with_tokenizer(folder, lambda content: None)) == 256
    added = {"id": 5000, "content": "<image>", "special": True}
    assert tokenizer_size(with_tokenizer(folder, lambda content: content["added_tokens"].append(added))) == 256
    unigram = [["a", -1.0], ["b", -2.0]]
    assert tokenizer_size(with_tokenizer(folder, lambda content: content["model"].update(vocab=unigram))) == 2


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": {"vocab": {"a": "b"}}}', '{"model": 3}', "[" * 10**5])
def test_a_tokenizer_that_is_none(text: str, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: unreadable; fetch it again"):
        tokenizer_size(find_source(str(folder)))
