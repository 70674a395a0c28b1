"""`compress push`, and models from the Hub in every verb, as a user gives the commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import Command, process
from tests.hub_server import HubServer, environment

REPO = "alice/quick-4bit"


@pytest.fixture
def alice(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    return hub


def test_push_says_where_it_is_and_how_it_is_loaded(alice: HubServer, compress: Command, finished: Path) -> None:
    answer = compress("push", finished, REPO)
    assert answer.code == 0, answer.err
    first, second = answer.out.splitlines()
    assert re.fullmatch(rf"\d+ files, [\d.]+ KiB: {alice.url}/{REPO} \(private\)", first)
    assert second.startswith(f"try it:  compress generate {REPO} --prompt ")
    assert answer.err.startswith("note: the card names no base model")
    generated = compress("generate", REPO, "--prompt", "Once", "-n", 4, "--json", "--no-chat")
    assert json.loads(generated.out)["new_tokens"] > 0


def test_a_dry_run_lists_files_and_card(alice: HubServer, compress: Command, finished: Path) -> None:
    answer = compress("push", finished, REPO, "--dry-run", "--revision", "4bit", "--public")
    assert answer.code == 0
    for name in ("config.json", "recipe.yaml", "tokenizer.json", "compress_report.json", "README.md"):
        assert re.search(rf"^{re.escape(name)} +[\d.]+ (B|KiB)$", answer.out, re.MULTILINE)
    assert "    license:" in answer.out or "    # quick-4bit" in answer.out
    assert f"would go to a new public {REPO}, branch 4bit" in answer.out
    assert alice.repos == {}


def test_json(alice: HubServer, compress: Command, finished: Path) -> None:
    content = json.loads(compress("push", finished, REPO, "--json", "--base-model", "bob/gone").out)
    assert (content["repo"], content["private"], content["base_model"]) == (REPO, True, "bob/gone")
    assert content["files"].keys() >= {"config.json", "README.md"}
    assert content["commit"] == alice.repos[REPO].branches["main"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("{finished}", "carol/x"), 1, "carol/x: the token may not do this .*; use one with the right to"),
        (("{finished}", REPO, "--token", "hf_secret"), 1, "the Hub does not know the token that was given"),
        (("{finished}", "alice/taken"), 2, "alice/taken exists and holds another model .*--overwrite"),
        (("{model}", REPO), 1, r"no report of a run and no README.md in it"),
        (("/no/such", REPO), 1, "/no/such: no such folder"),
        (("{finished}",), 2, "Missing argument 'REPO'; see: compress push --help"),
        (("{finished}", REPO, "--base-model", "not an id"), 2, "--base-model not an id: not the id of a model"),
    ],
)
def test_refusals(
    arguments: tuple[str, ...], code: int, says: str, alice: HubServer, compress: Command, finished: Path, model: Path
) -> None:
    alice.add("alice/taken", {"config.json": b"{}", "model.safetensors": b"x"})
    answer = compress("push", *(a.format(finished=finished, model=model) for a in arguments))
    assert answer.code == code
    assert re.search(says, answer.error), answer.error
    assert "hf_" not in answer.err


def test_an_interrupted_upload_goes_on(alice: HubServer, finished: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle of a real process, and the same command again."""
    settings = {**os.environ, **environment(alice, tmp_path / "home"), "HF_TOKEN": "hf_alice"}
    alice.delay = 1.0
    pushing = process("push", finished, REPO, env={**settings, "PYTHONPATH": str(Path(__file__).parents[2])})
    end = time.monotonic() + 240
    while not alice.uploaded and time.monotonic() < end:
        time.sleep(0.02)
    pushing.send_signal(2)
    out, err = pushing.communicate(timeout=240)
    assert (pushing.returncode, out) == (130, "")
    assert err.splitlines()[-2:] == ["what has gone up is kept by the Hub: the same command goes on", "interrupted"]
    kept = list(alice.uploaded)
    assert kept
    alice.delay = 0.0
    again = process("push", finished, REPO, env={**settings, "PYTHONPATH": str(Path(__file__).parents[2])})
    out, err = again.communicate(timeout=240)
    assert again.returncode == 0, err
    assert f"{alice.url}/{REPO} (private)" in out
    assert len(alice.uploaded) == len(set(alice.uploaded))


def test_every_verb_takes_a_model_from_the_hub(
    hub: HubServer, compress: Command, model: Path, recipe: Path, tmp_path: Path
) -> None:
    hub.add("bob/llama", model)
    planned = json.loads(compress("plan", "--recipe", recipe, "bob/llama", "--json").out)
    assert planned["base"]["id"] == "bob/llama"
    assert not list((Path(os.environ["HF_HOME"]) / "hub").rglob("*.safetensors"))
    out = tmp_path / "out"
    ran = compress("run", "--recipe", recipe, "--set", "model=bob/llama", "--out", out)
    assert ran.code == 0, ran.err
    assert "fetching bob/llama: " in ran.err
    for verb in (("inspect", "bob/llama", "--check"), ("eval", "bob/llama", "--max-tokens", 128, "--length", 32)):
        answer = compress(*verb)
        assert answer.code == 0, answer.err
    assert compress("generate", "bob/llama", "-p", "x", "-n", 2).code == 0
    front = (out / "README.md").read_text().split("---")[1]
    assert yaml.safe_load(front)["base_model"] == "bob/llama"


def test_a_run_that_pushes(alice: HubServer, compress: Command, recipe: Path, tmp_path: Path) -> None:
    options = ("--recipe", recipe, "--out", tmp_path / "out", "--set", f"output.push_to_hub={REPO}")
    answer = compress("run", *options, "--set", "evaluation=false", "--set", "output.push_to_hub.private=false")
    assert answer.code == 0, answer.err
    assert f"{alice.url}/{REPO} (public)" in answer.out
    again = compress("run", *options, "--set", "evaluation=false", "--json")
    assert json.loads(again.out)["pushed"]["repo"] == REPO
    assert json.loads(again.out)["already_finished"]


def test_errors_of_a_real_process_are_one_line_and_quick(recipe: Path, tmp_path: Path) -> None:
    """Nobody listens at this address; the client's own retries and warnings must not show."""
    settings = {
        "HF_ENDPOINT": "http://127.0.0.1:1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path),
        "HF_TOKEN": "hf_alice",
    }
    environment = {**os.environ, **settings, "PYTHONPATH": str(Path(__file__).parents[2])}
    for arguments in (("plan", "--recipe", recipe, "bob/llama"), ("generate", "bob/llama", "-p", "x")):
        start = time.monotonic()
        out, err = process(*arguments, env=environment, stdin=subprocess.DEVNULL).communicate(timeout=120)
        assert out == ""
        assert re.fullmatch(
            r"error: bob/llama: no such folder here, and the Hub cannot be reached \(ConnectError\); .*give its folder\n",
            err,
        )
        assert time.monotonic() - start < 100  # not the minutes of the client's retries
    shutil.rmtree(tmp_path / "hub", ignore_errors=True)
