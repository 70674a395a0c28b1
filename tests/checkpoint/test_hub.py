"""Models from the Hub, by the real client and a Hub on this machine: what is fetched, when, and what keeps it from us."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from compress.checkpoint import hub as hub_module
from compress.checkpoint.load import load
from compress.checkpoint.source import find_source
from compress.errors import CheckpointError
from tests.hub_server import HubServer
from tests.tiny_models import save_tiny

NAME = "alice/tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several shards, with what original repositories hold beside it."""
    made = save_tiny("llama", tmp_path_factory.mktemp("models") / "llama", max_shard_size="200KB")
    (made / "README.md").write_text("---\nlicense: mit\n---\n")
    (made / "original").mkdir()
    (made / "original" / "consolidated.safetensors").write_bytes(b"not for us")
    (made / "consolidated.safetensors").write_bytes(b"neither")
    return made


@pytest.fixture
def server(hub: HubServer, folder: Path) -> HubServer:
    hub.add(NAME, folder)
    return hub


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def whole_files(server: HubServer) -> list[str]:
    """The weight files that were sent without a range."""
    return server.seen(r"GET /cdn/")


@pytest.mark.parametrize(("first", "requests"), [(100_000, 1), (8, 2)])
def test_only_config_index_and_headers_are_read_before_the_weights_are_needed(
    first: int, requests: int, server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "FIRST_BYTES", first)
    source = find_source(NAME)
    local = find_source(str(folder))
    assert source.folder is None
    assert source.config == local.config
    assert {n: (i.dtype, i.shape, i.offset, i.nbytes) for n, i in source.infos.items()} == {
        n: (i.dtype, i.shape, i.offset, i.nbytes) for n, i in local.infos.items()
    }
    assert source.has_tokenizer
    assert len(server.seen("GET /cdn/")) == requests * len(shards(folder))
    if first == 8:
        assert server.sent < sum(f.stat().st_size for f in shards(folder)) / 10


def test_fetching_takes_the_checkpoint_and_leaves_other_weights(server: HubServer, folder: Path) -> None:
    notes: list[str] = []
    fetched = find_source(NAME).fetch(notes.append)
    for shard in shards(folder):
        assert (fetched / shard.name).read_bytes() == shard.read_bytes()
    assert {"config.json", "tokenizer.json", "README.md"} <= {f.name for f in fetched.iterdir()}
    assert not (fetched / "consolidated.safetensors").exists()
    assert not (fetched / "original").exists()
    assert len(notes) == 1
    assert notes[0].startswith(f"fetching {NAME}: ")
    server.requests.clear()
    assert find_source(NAME).fetch(notes.append) == fetched
    assert len(notes) == 1
    assert len(server.seen("GET /cdn/")) == len(shards(folder))  # the headers once more, nothing else


def test_a_loaded_model_is_the_same_as_from_its_folder(server: HubServer, folder: Path) -> None:
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(load(NAME)(ids).logits, load(folder)(ids).logits)


def test_our_own_format_is_found_on_the_hub(hub: HubServer, tmp_path: Path) -> None:
    from compress.pipeline.run import run
    from tests.runs import recipe_for

    text = tmp_path / "text.txt"
    text.write_text("the old bridge over the river went slowly under the stone. " * 60)
    source = save_tiny("llama", tmp_path / "model")
    result = run(
        recipe_for(source, [{"rtn": {"group_size": 32}}], text, evaluation=False, output={"format": "compress"}),
        tmp_path / "out",
    )
    hub.add("alice/own", result.folder)
    found = find_source("alice/own")
    assert found.infos.keys() == find_source(str(result.folder)).infos.keys()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(load("alice/own")(ids).logits, load(result.folder)(ids).logits)


def test_a_download_that_is_cut_off_goes_on_within_the_file(
    server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    source = find_source(NAME)
    server.sent = 0
    server.trouble("GET /cdn/", cut=50_000)
    fetched = source.fetch()
    assert [f.read_bytes() for f in shards(fetched)] == [f.read_bytes() for f in shards(folder)]
    total = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    assert server.sent < total + 1000  # nothing twice


def test_a_download_that_fails_keeps_what_has_arrived(server: HubServer, folder: Path) -> None:
    source = find_source(NAME)
    last = server.repos[NAME].files()[shards(folder)[-1].name].oid
    server.trouble(f"GET /cdn/{last}", cut=1000, times=100)
    with pytest.raises(
        CheckpointError, match="check the network; what has arrived is kept: give the same command again"
    ):
        source.fetch()
    server.troubles.clear()
    server.requests.clear()
    fetched = find_source(NAME)
    server.requests.clear()
    again = fetched.fetch()
    assert shards(again)[-1].read_bytes() == shards(folder)[-1].read_bytes()
    assert [line for line in whole_files(server) if last not in line] == []


def test_without_a_network_the_cache_serves(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = find_source(NAME).fetch()
    unreachable(monkeypatch)
    source = find_source(NAME)
    assert (source.folder, source.repo, source.fetch()) == (fetched, NAME, fetched)
    offline(monkeypatch)
    assert find_source(NAME).folder == fetched


def test_without_a_network_and_with_part_of_a_model_in_the_cache(
    server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = find_source(NAME).fetch()
    shards(fetched)[0].unlink()
    unreachable(monkeypatch)
    with pytest.raises(
        CheckpointError, match=r"the Hub cannot be reached \(ConnectError\); check the network, or download"
    ):
        find_source(NAME)


def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("token", "says"),
    [
        (None, "access is gated; accept its licence on http.*/alice/gated, then: hf auth login, or set HF_TOKEN"),
        ("hf_bob", "access is gated"),
        ("hf_wrong", "does not know the token that was given; make a new one"),
    ],
)
def test_a_gated_model(
    token: str | None, says: str, hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("alice/gated", folder, gated=True)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(CheckpointError, match=f"^alice/gated: .*{says}") as caught:
        find_source("alice/gated")
    assert token is None or token not in str(caught.value)
    hub.repos["alice/gated"].allowed.add("bob")
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    assert find_source("alice/gated").infos


def test_a_private_model(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("alice/hidden", folder, private=True)
    with pytest.raises(CheckpointError, match=r"no such model on the Hub \(or it is private: hf auth login"):
        find_source("alice/hidden")
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    assert find_source("alice/hidden").infos


def test_revisions(server: HubServer, folder: Path) -> None:
    with pytest.raises(CheckpointError, match="the Hub has no such revision of it; check"):
        find_source(NAME, "v2")
    repo = server.repos[NAME]
    first = repo.branches["main"]
    repo.commit({k: f for k, f in repo.files().items() if k != "README.md"}, "v2")
    assert "README.md" not in find_source(NAME, "v2").files
    assert "README.md" in find_source(NAME, first).files


def test_a_repository_that_changes_between_plan_and_run(server: HubServer) -> None:
    source = find_source(NAME)
    repo = server.repos[NAME]
    repo.commit(repo.files(), message="later")
    with pytest.raises(CheckpointError, match="changed on the Hub since it was planned; give the same command again"):
        source.fetch()


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"README.md": b""}, r"the Hub has no config\.json"),
        ({"config.json": b"{}", "pytorch_model.bin": b""}, "the Hub has no safetensors weights"),
        ({"config.json": b"{}", "model.safetensors": b"nonsense"}, "not a safetensors file"),
        ({"config.json": b"{}", "model.safetensors": b""}, "not a safetensors file"),
        ({"config.json": b"{", "model.safetensors": b""}, "not JSON"),
        (
            {"config.json": b"{}", "model.safetensors.index.json": b'{"weight_map": {"a": "x.safetensors"}}'},
            "x.safetensors, of its index, is not on the Hub",
        ),
    ],
)
def test_a_repository_that_is_no_model(files: dict[str, bytes], says: str, hub: HubServer) -> None:
    hub.add("alice/none", files)
    with pytest.raises(CheckpointError, match=f"alice.*none.*{says}") as caught:
        find_source("alice/none")
    assert "\n" not in str(caught.value)


def test_a_hub_that_is_down(server: HubServer) -> None:
    server.trouble("GET /api/models", status=503, times=100)
    with pytest.raises(CheckpointError, match=r"the Hub \(http.*\) answers 503; try again later"):
        find_source(NAME)


def test_too_little_disk(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    source = find_source(NAME)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(hub_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        CheckpointError, match=r"MiB are to be fetched into .*; free some space or move the cache: HF_HOME"
    ):
        source.fetch()
    assert re.search("cdn", "".join(server.requests))
    assert not list(Path(shutil.os.environ["HF_HOME"]).rglob("*-of-*.safetensors"))
