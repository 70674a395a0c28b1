"""`compress chat`, with questions from a pipe and at a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Answer, Command
from tests.tiny_models import save_tiny

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
)


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template. It has nothing to say, but says it."""
    folder = save_tiny("llama", tmp_path_factory.mktemp("chat") / "talker", max_position_embeddings=2048)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tensors = load_file(folder / "model.safetensors")
    head = tensors["lm_head.weight"]
    letters = range(64, 64 + 26)  # a to z in the byte-level alphabet
    for row in set(range(len(head))) - set(letters):  # it says letters only, and never ends by itself
        head[row] = head[letters[row % len(letters)]] / 2
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


Talk = Callable[..., Answer]


@pytest.fixture
def talk(compress: Command, talker: Path, monkeypatch: pytest.MonkeyPatch) -> Talk:
    """`talk("hello\\n/exit\\n", "--json")`, with the first as standard input."""

    def command(typed: str, *options: object, model: object = None) -> Answer:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        return compress("chat", model or talker, "--greedy", "-n", 12, *options)

    return command


def messages(answer: Answer) -> list[dict[str, str]]:
    assert answer.code == 0, answer.err
    found: list[dict[str, str]] = json.loads(answer.out)["messages"]
    return found


def questions(answer: Answer) -> list[str]:
    return [m["content"] for m in messages(answer) if m["role"] == "user"]


def test_questions_from_a_pipe(talk: Talk) -> None:
    answer = talk("hello\n\nand again\n", "--json")
    assert [m["role"] for m in messages(answer)] == ["user", "assistant"] * 2
    assert questions(answer) == ["hello", "and again"]
    content = json.loads(answer.out)
    assert [r["new_tokens"] for r in content["replies"]] == [12, 12]
    assert content["replies"][1]["context_tokens"] > content["replies"][0]["context_tokens"] + 12
    assert content["seconds"] > 0


def test_the_replies_appear_on_stdout_and_nothing_else(talk: Talk) -> None:
    replies = [m["content"] for m in messages(talk("hello\nand again\n", "--json")) if m["role"] == "assistant"]
    answer = talk("hello\nand again\n")
    assert answer.code == 0
    for reply in replies:
        assert reply in answer.out
    assert answer.err.startswith("2 replies, 24 tokens in ")
    assert talk("hello\n", "--quiet").err == ""


def test_the_reply_is_that_of_the_model_on_the_rendered_template(talk: Talk, talker: Path) -> None:
    """Second turns too, which go on from the keys and values of the first."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    answer = talk("what is it\nand now\n", "--json", "--system", "be brief")
    said = messages(answer)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(talker), AutoTokenizer.from_pretrained(talker)
    for turn in (1, 3):
        head = [{"role": "system", "content": "be brief"}, *said[:turn]]
        text = tokenizer.apply_chat_template(head, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip() == said[turn]["content"]


def test_a_turn_reads_its_own_tokens_only(talk: Talk) -> None:
    answer = talk("a question of some length\nmore\n", "--verbose")
    read = [int(n) for n in re.findall(r"(\d+) newly read", answer.err)]
    context = [int(n) for n in re.findall(r"(\d+) tokens of context of 2048", answer.err)]
    assert len(read) == 2
    assert read[1] == context[1] - 12 - (context[0] - 1)  # the last token of a reply is not read until then


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("one\\\ntwo\nthree\n", ["one\ntwo", "three"]),
        ('"""one\n\ntwo"""\nthree', ["one\n\ntwo", "three"]),
        ('"""\none\\\ntwo\n"""\n', ["one\\\ntwo"]),
        ('"""just one"""\n', ["just one"]),
        ('"""never closed\nbut said', ["never closed\nbut said"]),
        ("ends with a line to come\\", ["ends with a line to come"]),
        ("kept\ntaken back\n/undo\n", ["kept"]),
        ("gone\n/reset\nkept\n", ["kept"]),
        ("kept\n/exit\nnever read\n", ["kept"]),
        ("  spaces  \n", ["spaces"]),
        ("/undo\n/reset\n/help\n", []),
        ("", []),
    ],
)
def test_lines_and_commands(typed: str, expected: list[str], talk: Talk) -> None:
    assert questions(talk(typed, "--json")) == expected


def test_what_commands_say(talk: Talk) -> None:
    answer = talk("/undo\n/help\n/frob x\n/reset\n", "--quiet")
    assert answer.out == ""
    assert answer.err.count("/reset   begin anew") == 2
    for line in ("there is nothing to take back", "/frob: no such command", "a new conversation"):
        assert line in answer.err


def test_the_oldest_messages_are_dropped_and_that_is_said(talk: Talk, tmp_path: Path) -> None:
    small = save_tiny("llama", tmp_path / "small", max_position_embeddings=128)
    (small / "chat_template.jinja").write_text(TEMPLATE)
    answer = talk("first\nsecond\nthird\n", "--json", model=small)
    assert "the 2 oldest messages no longer fit into the context and are forgotten" in answer.err
    assert questions(answer)[-1] == "third"
    assert "first" not in questions(answer)
    assert all(r["context_tokens"] <= 128 for r in json.loads(answer.out)["replies"])
    assert (
        "takes 224 tokens with its frame; of the model's 128, 116 are for messages"
        in talk("x" * 200, model=small).error
    )


def test_seeds(talk: Talk, compress: Command, talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(seed: int) -> Any:
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
        return messages(compress("chat", talker, "-n", 12, "--seed", seed, "-t", 2, "--json"))

    assert said(1) == said(1) != said(2)


def test_a_model_without_a_template(talk: Talk, model: Path, tmp_path: Path) -> None:
    error = talk("hello\n", model=model).error
    assert error.endswith("its tokenizer has no chat template; use compress generate, or give one with --template FILE")
    file = tmp_path / "chat.jinja"
    file.write_text(TEMPLATE)
    assert questions(talk("hello\n", "--template", file, "--json", model=model)) == ["hello"]


@pytest.mark.parametrize(
    ("template", "options", "says"),
    [
        (NO_SYSTEM, ("--system", "x"), r"the chat template fails \(System role not supported\); leave --system out"),
        ("{% for", (), "the chat template fails .*; use another --template"),
        (None, (), "--template .*missing.jinja: cannot be read: No such file or directory"),
        (TEMPLATE, ("-t", "1"), "--greedy and --temperature 1: choose one"),
    ],
)
def test_what_is_refused(template: str | None, options: tuple[str, ...], says: str, talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / ("chat.jinja" if template else "missing.jinja")
    if template:
        file.write_text(template)
    answer = talk("hello\n", "--template", file, *options)
    assert answer.code == 2
    assert re.search(says, answer.error)


# --- at a terminal ---


class Terminal:
    """`compress chat` with a terminal of its own."""

    def __init__(self, *arguments: object):
        self.seen = ""
        root = str(Path(__file__).parents[2])
        environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            line = [sys.executable, "-m", "compress", "chat", *map(str, arguments)]
            os.execve(sys.executable, line, environment)

    def until(self, text: str, seconds: float = 240) -> str:
        """What appears, up to `text`."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"{text!r} did not come:\n{self.seen}"
            if select.select([self.descriptor], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.descriptor, 10_000).decode(errors="replace")
                except OSError:  # the other side is gone
                    break
        before, found, self.seen = self.seen.partition(text)
        assert found, f"{text!r} did not come:\n{before}"
        return before

    def more(self, n: int) -> None:
        """Wait for so many more characters."""
        before = len(self.seen)
        while len(self.seen) < before + n:
            assert select.select([self.descriptor], [], [], 240)[0]
            self.seen += os.read(self.descriptor, 10_000).decode(errors="replace")

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def end(self) -> int:
        with_end = time.monotonic() + 120
        while time.monotonic() < with_end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if select.select([self.descriptor], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.descriptor, 10_000).decode(errors="replace")
                except OSError:
                    time.sleep(0.05)
        raise AssertionError("it does not end")


@pytest.fixture
def terminal(talker: Path) -> Iterator[Terminal]:
    made = Terminal(talker, "--greedy", "-n", "1900", "--verbose")
    yield made
    os.close(made.descriptor)


def test_control_c_stops_a_reply_and_control_d_ends(terminal: Terminal) -> None:
    terminal.until("> ")
    terminal.type("hello\n")
    terminal.until("hello")
    terminal.until("\n")
    terminal.more(20)  # the reply has begun
    terminal.type("\x03")
    terminal.until("> ")
    time.sleep(0.5)  # a signal in the instant between prompt and waiting is seen with the next key only
    terminal.type("\x03")  # at the prompt it ends nothing
    terminal.until("(/exit or Ctrl-D ends)")
    terminal.until("> ")
    terminal.type("again\n")
    terminal.until("again")
    terminal.more(20)
    terminal.type("\x03")
    tokens = re.search(r"(\d+) tokens in", terminal.until("newly read"))
    assert tokens is not None
    assert int(tokens[1]) < 1900  # it was stopped
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.end() == 0
    assert "2 replies" in terminal.seen
