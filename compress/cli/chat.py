"""`compress chat`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli.generate import Greedy, Seed, Temperature
from compress.cli.options import (
    Arithmetic,
    Debug,
    Device,
    Json,
    ModelFolder,
    Quiet,
    RemoteCode,
    Revision,
    check_arithmetic,
    check_device,
    refuse_unfinished,
)

if TYPE_CHECKING:
    from compress.cli.conversation import Conversation, Reply

System = Annotated[str | None, typer.Option("--system", "-s", metavar="TEXT", help="what the model is told first")]
Template = Annotated[
    Path | None,
    typer.Option("--template", metavar="FILE", help="a chat template (Jinja), instead of the tokenizer's own"),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="the longest reply")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="after each reply its tokens per second, on stderr")]
HELP = """/reset   begin anew        /undo    take back the last question        /exit    end (or Ctrl-D)
Ctrl-C stops a reply. A line that ends with \\ goes on in the next one; \"\"\" begins and ends a message of several lines."""
QUOTES = '"""'


def chat(
    model: ModelFolder,
    system: System = None,
    template: Template = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = None,
    greedy: Greedy = False,
    seed: Seed = 0,
    arithmetic: Arithmetic = "int8",
    device: Device = "auto",
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    verbose: Verbose = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Talk with a model in the terminal, on the packed weights if it is compressed. Questions may come from a pipe.

    In the conversation: /help, /reset, /undo, /exit. Ctrl-C stops a reply, Ctrl-D ends.

    \b
    Example:  compress chat out/llama3-4bit --system "You answer in one sentence."
    """
    from compress.cli.generate import heat, hide_bars, tokenizer_of
    from compress.cli.show import note, print_json

    chosen = heat(greedy, temperature)
    written = None if template is None else _read_template(template)
    how: dict[str, Any] = check_arithmetic(arithmetic)
    refuse_unfinished(model)
    import torch

    from compress.checkpoint.load import load
    from compress.pipeline.run import Machine, compute_device

    if quiet or not sys.stderr.isatty():
        hide_bars()
    place = compute_device(Machine(check_device(device)))
    loaded = load(model, device=place, revision=revision, trust_remote_code=trust_remote_code, **how)
    tokenizer = tokenizer_of(loaded, trust_remote_code)
    if written is not None:
        tokenizer.chat_template = written
    _check_template(tokenizer, model)
    from compress.cli.conversation import Conversation

    torch.manual_seed(seed)
    talk = Conversation(loaded, tokenizer, system=system, max_new_tokens=max_new_tokens, temperature=chosen)
    replies = _converse(talk, live=not as_json, verbose=verbose, quiet=quiet)
    tokens, seconds = sum(r.tokens for r in replies), sum(r.seconds for r in replies)
    if as_json:
        turns = [{"new_tokens": r.tokens, "seconds": r.seconds, "context_tokens": r.context} for r in replies]
        print_json({"messages": talk.messages, "replies": turns, "new_tokens": tokens, "seconds": seconds})
    elif replies and not quiet:
        plural = "reply" if len(replies) == 1 else "replies"
        note(f"{len(replies)} {plural}, {tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} per second")


def _read_template(file: Path) -> str:
    from compress.errors import RecipeError

    try:
        return file.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--template {file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _check_template(tokenizer: object, model: str) -> None:
    """Raises: RecipeError if there is no chat template."""
    from compress.errors import RecipeError

    if not getattr(tokenizer, "chat_template", None):
        raise RecipeError(
            f"{model}: its tokenizer has no chat template; use compress generate, or give one with --template FILE"
        )


def _converse(talk: Conversation, *, live: bool, verbose: bool, quiet: bool) -> list[Reply]:
    """Questions and replies until the user has enough."""
    from compress.cli.show import note, write
    from compress.errors import RecipeError

    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if at_terminal and not quiet:
        note(HELP)
    replies: list[Reply] = []
    for message in _messages(at_terminal):
        if message.startswith("/"):
            if message == "/exit":
                break
            note(_command(talk, message))
            continue
        with _interrupts(talk.stop):
            try:
                reply = talk.ask(message, write if live else lambda text: None, _dropped)
            except RecipeError as error:
                if not at_terminal:
                    raise
                note(f"error: {error}")
                continue
        replies.append(reply)
        if live:
            write("" if reply.text.endswith("\n") and not reply.stopped else "\n")
        if verbose:
            note(
                f"{reply.tokens} tokens in {reply.seconds:.1f} s, {reply.tokens / reply.seconds:.1f} per second; "
                f"{reply.context} tokens of context{'' if talk.limit is None else f' of {talk.limit}'}, {reply.read} newly read"
            )
    return replies


def _dropped(n_messages: int) -> None:
    from compress.cli.show import note

    note(f"note: the {n_messages} oldest messages no longer fit into the context and are forgotten")


def _command(talk: Conversation, line: str) -> str:
    """Do what a line that begins with / asks for. Returns: what to say about it."""
    if line == "/reset":
        talk.reset()
        return "a new conversation"
    if line == "/undo":
        return "the last question is taken back" if talk.undo() else "there is nothing to take back"
    return HELP if line == "/help" else f"{line.split()[0]}: no such command\n{HELP}"


def _messages(at_terminal: bool) -> Iterator[str]:
    """What the user says, message by message, blank ones left out."""
    if at_terminal:
        import readline  # noqa: F401  # line editing and history for input()
    block: list[str] | None = None  # the lines of a message that is not finished
    quoted = False
    while (line := _line(at_terminal, block is not None)) is not None:
        if line == INTERRUPTED:
            block, quoted = None, False
            continue
        if block is None and line.lstrip().startswith(QUOTES):
            line, block, quoted = line.lstrip()[len(QUOTES) :], [], True
        if quoted:
            assert block is not None
            end = line.rstrip().endswith(QUOTES)
            block.append(line.rstrip()[: -len(QUOTES)] if end else line)
            if not end:
                continue
        elif line.endswith("\\"):
            block = [*(block or []), line[:-1]]
            continue
        else:
            block = [*(block or []), line]
        message, block, quoted = "\n".join(block).strip(), None, False
        if message:
            yield message
    rest = "\n".join(block or []).strip()
    if rest:
        yield rest


INTERRUPTED = "\x03"  # Ctrl-C at the prompt


def _line(at_terminal: bool, continued: bool) -> str | None:
    """A line of input without its end; None where there is no more."""
    from compress.cli.show import note
    from compress.cli.signals import Ended

    if not at_terminal:
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None
    try:
        return input("… " if continued else "> ")
    except EOFError:
        note("")
        return None
    except Ended as ended:
        if ended.number != signal.SIGINT:
            raise
        note("\n(/exit or Ctrl-D ends)")
        return INTERRUPTED


@contextmanager
def _interrupts(stop: Callable[[], None]) -> Iterator[None]:
    """Within it Ctrl-C calls `stop`, and only a second one ends the program."""
    before = signal.getsignal(signal.SIGINT)
    if not callable(before):  # somebody wants it ignored
        yield
        return

    def once(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        stop()

    signal.signal(signal.SIGINT, once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
