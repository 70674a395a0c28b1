"""Pushing results, by the real client to a Hub on this machine: what arrives, what is refused, what goes on where it was."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from compress.checkpoint.load import load
from compress.errors import CheckpointError, CompressError, RecipeError
from compress.pipeline.run import run
from compress.publish.base_model import front_matter
from compress.publish.hub import Pushed, push
from compress.recipe import Recipe
from tests.hub_server import HubServer
from tests.runs import recipe_for
from tests.tiny_models import save_tiny

REPO = "alice/tiny-4bit"
BASE = "bob/tiny"
BASE_CARD = """---
license: other
license_name: tiny-community
license_link: LICENSE.txt
language: [en, de]
tags: [novels, gguf, "region:us", safetensors]
extra_gated_prompt: "Do you agree?"
---
# tiny
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = save_tiny("llama", tmp_path_factory.mktemp("secret-place") / "my-llama")
    (made / "README.md").write_text(BASE_CARD)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "_name_or_path": str(made)}))
    return made


@pytest.fixture(scope="module")
def recipe(model: Path, text: Path) -> Recipe:
    return recipe_for(model, [{"gptq": {"bits": 4, "group_size": 32}}], text)


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(recipe, tmp_path_factory.mktemp("results") / "tiny").folder


@pytest.fixture
def result(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished folder, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "result"))


@pytest.fixture
def alice(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The Hub, and the token of alice."""
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    return hub


def contents(server: HubServer, repo: str = REPO, revision: str = "main") -> dict[str, bytes]:
    return {name: file.content for name, file in server.repos[repo].files(revision).items()}


def card_on(server: HubServer, repo: str = REPO) -> str:
    return contents(server, repo)["README.md"].decode()


def pushed(folder: Path, **options: object) -> Pushed:
    return push(folder, REPO, **options)  # type: ignore[arg-type]


# --- what arrives ---


def test_a_new_repository(alice: HubServer, finished: Path) -> None:
    done = pushed(finished)
    there = contents(alice)
    assert alice.repos[REPO].private
    assert (done.created, done.private, done.url) == (True, True, f"{alice.url}/{REPO}")
    assert done.commit == alice.repos[REPO].branches["main"]
    weights = [f.name for f in finished.glob("*.safetensors")]
    assert weights
    for name in [*weights, "tokenizer.json", "model.safetensors.index.json"]:
        assert there[name] == (finished / name).read_bytes()
    assert done.files == {name: len(content) for name, content in there.items() if name != ".gitattributes"}


def test_it_loads_from_there(alice: HubServer, finished: Path) -> None:
    pushed(finished)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(load(REPO)(ids).logits, load(finished)(ids).logits)


def test_large_files_in_several_parts(alice: HubServer, finished: Path) -> None:
    alice.part_bytes = 20_000
    pushed(finished)
    assert alice.seen(r"PUT /lfs/\w+/2")
    for file in finished.glob("*.safetensors"):
        assert contents(alice)[file.name] == file.read_bytes()


def test_public_only_if_said(alice: HubServer, finished: Path) -> None:
    assert not pushed(finished, private=False).private
    assert not alice.repos[REPO].private
    again = pushed(finished)
    assert any("stays public" in note for note in again.notes)


def test_only_what_belongs_to_the_result_goes_up(alice: HubServer, result: Path) -> None:
    (result / "notes.txt").write_text("mine")
    (result / ".cache" / "huggingface").mkdir(parents=True)
    (result / ".cache" / "huggingface" / "x.json").write_text("{}")
    (result / "old.safetensors").write_bytes(b"something else")
    (result / "additional_chat_templates").mkdir()
    (result / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    done = pushed(result)
    assert sorted(done.left_out) == [".cache/huggingface/x.json", "notes.txt", "old.safetensors"]
    assert not set(done.left_out) & set(contents(alice))
    assert "additional_chat_templates/tools.jinja" in contents(alice)


def test_nothing_tells_of_this_machine(alice: HubServer, finished: Path, model: Path, text: Path) -> None:
    pushed(finished, base_model=None)
    for name, content in contents(alice).items():
        for secret in (
            str(finished.parent),
            str(model.parent),
            str(text.parent),
            str(Path.home()) + "/",
            "secret-place",
        ):
            assert secret.encode() not in content, f"{secret} in {name}"
    assert json.loads(contents(alice)["compress_report.json"])["model"] == "my-llama"
    recipe = yaml.safe_load(contents(alice)["recipe.yaml"])
    assert recipe["model"]["path"] == "my-llama"
    assert recipe["calibration"]["data"] == ["text.txt"]
    Recipe.from_dict(recipe)
    assert "_name_or_path" not in json.loads(contents(alice)["config.json"])


def test_a_branch(alice: HubServer, finished: Path) -> None:
    done = pushed(finished, revision="4bit")
    assert done.revision == "4bit"
    assert "config.json" in contents(alice, revision="4bit")
    assert "config.json" not in contents(alice)
    assert pushed(finished, revision="4bit").commit == done.commit  # nothing new, no commit


def test_a_name_of_ones_own(alice: HubServer, finished: Path) -> None:
    assert push(finished, "just-a-name").repo == "alice/just-a-name"
    assert "config.json" in contents(alice, "alice/just-a-name")


def test_the_folder_is_not_touched(alice: HubServer, result: Path) -> None:
    before = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in result.rglob("*") if f.is_file()}
    pushed(result)
    assert {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in result.rglob("*") if f.is_file()} == before


# --- again, and after interruptions ---


def test_an_update_sends_what_changed(
    alice: HubServer, finished: Path, model: Path, text: Path, tmp_path: Path
) -> None:
    pushed(finished)
    alice.uploaded.clear()
    other = recipe_for(model, [{"gptq": {"bits": 3, "group_size": 32}}], text, evaluation=False)
    smaller = run(other, tmp_path / "three").folder
    (tmp_path / "three" / "LICENSE").write_text("as you like")
    done = pushed(smaller)
    assert not done.created
    assert len(alice.repos[REPO].commits) == 3
    for name, content in contents(alice).items():
        if name.endswith(".safetensors"):
            assert content == (smaller / name).read_bytes()
    unchanged = [f for f in smaller.glob("*.safetensors") if f.read_bytes() == (finished / f.name).read_bytes()]
    assert unchanged  # embeddings and head
    sent = {alice.repos[REPO].files()[f.name].oid for f in smaller.glob("*.safetensors") if f not in unchanged}
    assert sent <= set(alice.uploaded)
    assert not {alice.repos[REPO].files()[f.name].oid for f in unchanged} & set(alice.uploaded)


def test_weights_of_an_earlier_result_are_removed(alice: HubServer, finished: Path) -> None:
    pushed(finished)
    repo = alice.repos[REPO]
    left = {**repo.files(), "model.safetensors": next(iter(repo.files().values()))}
    repo.commit({**left, "notes.md": repo.files()["README.md"]})
    assert pushed(finished).removed == ["model.safetensors"]
    assert "model.safetensors" not in contents(alice)
    assert "notes.md" in contents(alice)


def test_an_upload_that_is_cut_off_goes_on(alice: HubServer, finished: Path) -> None:
    weights = {f.name for f in finished.glob("*.safetensors")}
    alice.trouble(r"PUT /lfs/", cut=1000, times=10**6, after=2)  # two files go through, then the line is cut for good
    with pytest.raises(CheckpointError, match="what has gone up is kept: the same command goes on") as caught:
        pushed(finished)
    assert "\n" not in str(caught.value)
    assert "config.json" not in contents(alice)
    first = list(alice.uploaded)
    assert 0 < len(first) < len(weights)
    alice.troubles.clear()
    pushed(finished)
    assert len(alice.uploaded) == len(set(alice.uploaded))  # nothing twice
    assert {name for name in contents(alice) if name.endswith(".safetensors")} == weights


def test_a_short_interruption_is_overcome(alice: HubServer, finished: Path) -> None:
    alice.trouble(r"PUT /lfs/", cut=1000)
    alice.trouble(r"POST /.*/preupload/", status=503, times=2)
    assert pushed(finished).commit == alice.repos[REPO].branches["main"]


def test_a_folder_half_there_is_taken_for_the_same(alice: HubServer, finished: Path) -> None:
    """As an upload in several commits leaves it."""
    shard = sorted(finished.glob("*.safetensors"))[0]
    alice.add(REPO, {shard.name: shard.read_bytes()})
    pushed(finished)
    assert "config.json" in contents(alice)


# --- names ---


@pytest.mark.parametrize("report", [None, {"base": {"id": "meta/other"}, "work": {"weights": "else"}}])
def test_a_name_that_is_taken(report: dict[str, object] | None, alice: HubServer, finished: Path) -> None:
    files = {"config.json": b"{}", "model.safetensors": b"weights", "README.md": b"# mine"}
    if report is not None:
        files["compress_report.json"] = json.dumps(report).encode()
    repo = alice.add(REPO, files)
    with pytest.raises(RecipeError, match=f"{REPO} exists and holds another model .*; choose another name") as caught:
        pushed(finished)
    assert "--overwrite" in str(caught.value)
    assert len(repo.commits) == 1
    assert pushed(finished, overwrite=True).removed == ["model.safetensors"]
    assert contents(alice)["config.json"] != b"{}"


def test_an_empty_repository_is_filled(alice: HubServer, finished: Path) -> None:
    alice.add(REPO, {".gitattributes": b"", "README.md": b"---\nlicense: mit\n---\n", "LICENSE": b""}, private=True)
    assert not pushed(finished).created
    assert "config.json" in contents(alice)


# --- tokens and networks ---


@pytest.mark.parametrize(
    ("token", "repo", "says"),
    [
        ("hf_secret", REPO, "does not know the token that was given; make a new one"),
        (None, REPO, "there is no token to push with: hf auth login, or set HF_TOKEN"),
        ("hf_bob", REPO, "the token may not do this .*alice"),
        ("hf_alice", "no such/name", "not a name that a model on the Hub can have"),
        ("hf_alice", "a/b/c", "not a name that a model on the Hub can have"),
    ],
)
def test_who_may_not(
    token: str | None, repo: str, says: str, hub: HubServer, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(CheckpointError, match=f"^{repo}: .*{says}") as caught:
        push(finished, repo)
    assert hub.repos == {}
    assert token is None or token not in str(caught.value)


def test_a_token_that_is_given_wins(hub: HubServer, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert pushed(finished, token="hf_alice").created
    assert not pushed(finished, token="hf_alice").created


@pytest.mark.parametrize("kind", ["refused", "offline"])
def test_no_network(kind: str, alice: HubServer, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    if kind == "refused":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"the Hub cannot be reached \(.*\); check the network"):
        pushed(finished)
    looked = pushed(finished, dry_run=True)
    assert "config.json" in looked.files
    assert any("what the repository holds now is not known" in note for note in looked.notes)


def test_a_dry_run_changes_nothing(alice: HubServer, finished: Path) -> None:
    looked = pushed(finished, dry_run=True)
    assert alice.repos == {}
    assert not [line for line in alice.requests if not line.startswith(("GET", "HEAD"))]
    done = pushed(finished)
    assert looked.files == done.files
    assert looked.card == done.card == card_on(alice)


def test_a_mirror_without_xet(alice: HubServer, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hf_xet")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    pushed(finished)
    assert "config.json" in contents(alice)
    assert alice.seen("GET /api/models/.*/xet-write-token/main")
    assert alice.uploaded


# --- folders that are refused ---


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"no config\.json in it; name the folder of a finished run"),
        (lambda folder: (folder / ".compress").mkdir(), "an unfinished run, a model without its evaluation"),
        (lambda folder: sorted(folder.glob("*.safetensors"))[1].unlink(), "missing"),
        (lambda folder: cut(sorted(folder.glob("*.safetensors"))[1]), "truncated"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer\.json: is missing or was changed"),
        (lambda folder: (folder / "compress_report.json").write_text("{"), r"compress_report\.json: not JSON"),
        (lambda folder: (folder / "compress_report.json").write_text("{}"), "not the report of a run of this version"),
        (lambda folder: shutil.rmtree(folder), "no such folder"),
    ],
)
def test_a_folder_that_is_not_whole(damage: object, says: str, alice: HubServer, result: Path) -> None:
    damage(result)  # type: ignore[operator]
    with pytest.raises(CompressError, match=says):
        pushed(result)
    assert alice.requests == []


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


# --- the card ---


def test_the_card_of_a_local_base(alice: HubServer, finished: Path) -> None:
    done = pushed(finished)
    fields, body = front_matter(card_on(alice)), card_on(alice)
    assert "base_model" not in fields
    assert fields["license"] == "other"
    assert fields["license_name"] == "tiny-community"
    assert "license_link" not in fields  # a file of the base model that is not here
    assert fields["language"] == ["en", "de"]
    assert fields["tags"] == ["compress-llm", "compressed-tensors", "gptq", "novels"]
    assert any("--base-model" in note for note in done.notes)
    assert f'compress.load("{REPO}")' in body
    report = json.loads((finished / "compress_report.json").read_text())
    assert f"{report['evaluation']['model']['perplexity']:.3f}" in body
    assert f"{report['bits_per_weight']:.3f} bits per weight" in body
    assert "group_size: 32" in body


def test_the_card_of_a_base_on_the_hub(alice: HubServer, model: Path, text: Path, tmp_path: Path) -> None:
    alice.add(BASE, model, gated=True).allowed.add("alice")
    recipe = recipe_for(model, [{"rtn": {"bits": 4, "group_size": 32}}], text, model=BASE, evaluation=False)
    out = run(recipe, tmp_path / "out").folder
    pushed(out)
    fields = front_matter(card_on(alice))
    assert (fields["base_model"], fields["base_model_relation"]) == (BASE, "quantized")
    assert fields["license_link"] == f"https://huggingface.co/{BASE}/blob/main/LICENSE.txt"
    assert fields["extra_gated_prompt"] == "Do you agree?"
    assert f"Access to the base model {BASE} is gated" in card_on(alice)
    report = json.loads(contents(alice)["compress_report.json"])
    assert report["base"] == {"id": BASE, "title": "tiny", "commit": alice.repos[BASE].branches["main"]}


def test_a_base_that_is_named(alice: HubServer, finished: Path) -> None:
    alice.add(BASE, {"README.md": b"---\nlicense: mit\n---\n"})
    pushed(finished)
    assert not pushed(finished, base_model=BASE).created
    fields = front_matter(card_on(alice))
    assert (fields["base_model"], fields["license"]) == (BASE, "mit")
    assert yaml.safe_load(contents(alice)["recipe.yaml"])["model"]["path"] == BASE


def test_a_base_that_is_gone(alice: HubServer, finished: Path) -> None:
    done = pushed(finished, base_model="bob/gone")
    assert "The base model bob/gone is not, or no longer, to be found on the Hub" in card_on(alice)
    assert front_matter(card_on(alice))["license"] == "other"  # from the card of the folder
    assert any("bob/gone" in note for note in done.notes)


@pytest.mark.parametrize("card", [b"", b"not yaml", b"---\nlicense: [\n---\n", b"---\n- a\n---\n", b"\xff\xfe"])
def test_a_base_with_an_odd_card(card: bytes, alice: HubServer, finished: Path) -> None:
    alice.add(BASE, {"README.md": card} if card else {})
    pushed(finished, base_model=BASE)
    assert front_matter(card_on(alice))["base_model"] == BASE


def test_the_figure_of_the_card(alice: HubServer, finished: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    pushed(finished)
    assert "](compress_card.png)" in card_on(alice)
    pixels = image.imread(io.BytesIO(contents(alice)["compress_card.png"]))
    assert pixels.shape[:2] == (432, 900)
    assert len({tuple(colour) for colour in pixels.reshape(-1, pixels.shape[2])[::7]}) > 10  # something is drawn


def test_a_card_of_ones_own_stays(alice: HubServer, result: Path) -> None:
    edited = (result / "README.md").read_text().replace("compressed", "made smaller")
    (result / "README.md").write_text(edited)
    assert pushed(result).users_card
    assert card_on(alice) == edited


def test_a_card_that_the_hub_does_not_take(alice: HubServer, result: Path) -> None:
    (result / "README.md").write_text("---\nlicense: [a, b]\n---\n# mine\n")
    with pytest.raises(CheckpointError, match=r"Invalid metadata in README\.md\. - \"license\" must be a string"):
        pushed(result)


def test_an_export(alice: HubServer, finished: Path, tmp_path: Path) -> None:
    import compress

    gptq = tmp_path / "tiny-gptq"
    compress.export(finished, "gptq", gptq)
    done = push(gptq, "alice/tiny-gptq")
    card = card_on(alice, "alice/tiny-gptq")
    assert 'GPTQModel.load("alice/tiny-gptq")' in card
    assert "FOLDER_OR_ID" not in card
    assert front_matter(card)["license"] == "other"
    assert {"quantize_config.json", "compress_export.json", "recipe.yaml"} <= set(done.files)
    for name, content in contents(alice, "alice/tiny-gptq").items():
        assert str(tmp_path).encode() not in content, name
        assert str(finished.parent).encode() not in content, name
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(load("alice/tiny-gptq")(ids).logits, load(gptq)(ids).logits)
    assert not push(gptq, "alice/tiny-gptq").created  # again is an update


# --- from a recipe ---


def test_a_recipe_that_pushes(alice: HubServer, model: Path, text: Path, tmp_path: Path) -> None:
    wanted = {"push_to_hub": {"repo": REPO, "private": False}}
    recipe = recipe_for(model, [{"rtn": {"bits": 4, "group_size": 32}}], text, evaluation=False, output=wanted)
    done = run(recipe, tmp_path / "out")
    assert done.pushed is not None
    assert done.pushed.url.endswith(REPO)
    assert not alice.repos[REPO].private
    assert "push_to_hub" not in contents(alice)["recipe.yaml"].decode()
    again = run(recipe, tmp_path / "out")
    assert again.already_finished
    assert again.pushed is not None
    assert again.pushed.commit == done.pushed.commit


def test_a_recipe_whose_push_would_fail_is_refused_before_the_work(
    hub: HubServer, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(model, [{"rtn": {"group_size": 32}}], text, evaluation=False, output={"push_to_hub": REPO})
    with pytest.raises(CheckpointError, match="output.push_to_hub: alice/tiny-4bit: there is no token to push with"):
        run(recipe, tmp_path / "out")
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    hub.add(REPO, {"model.safetensors": b"another"})
    with pytest.raises(RecipeError, match="exists and holds another model"):
        run(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_push_that_fails_leaves_the_result(alice: HubServer, model: Path, text: Path, tmp_path: Path) -> None:
    alice.trouble(r"PUT /lfs", status=500, times=10**6)
    recipe = recipe_for(model, [{"rtn": {"group_size": 32}}], text, evaluation=False, output={"push_to_hub": REPO})
    with pytest.raises(
        CheckpointError, match="out is finished, but could not be pushed: alice/tiny-4bit: .*answers 500"
    ):
        run(recipe, tmp_path / "out")
    assert (tmp_path / "out" / "compress_report.json").exists()
    alice.troubles.clear()
    assert run(recipe, tmp_path / "out").already_finished
    assert "config.json" in contents(alice)
