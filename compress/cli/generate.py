"""`compress generate`."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
from compress.cli.sizes import FollowMemoryOption, MemoryBudget

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Prompt = Annotated[
    str, typer.Option("--prompt", "-p", metavar="TEXT", help="what to go on from; - reads it from stdin")
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="stop after so many tokens")]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature", "-t", min=0.0, help="0: always the likeliest token  [default: 0.8]", show_default=False
    ),
]
Greedy = Annotated[bool, typer.Option("--greedy", help="the same as --temperature 0")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="the same seed gives the same text")]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="put the prompt as a message of the user  [default: where the tokenizer has a chat template]",
        show_default=False,
    ),
]
TEMPERATURE = 0.8


def generate(
    model: ModelFolder,
    prompt: Prompt,
    max_new_tokens: MaxNewTokens = 100,
    temperature: Temperature = None,
    greedy: Greedy = False,
    seed: Seed = 0,
    chat: Chat = None,
    arithmetic: Arithmetic = "int8",
    memory_budget: MemoryBudget = None,
    follow_memory: FollowMemoryOption = None,
    device: Device = "auto",
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Let a model go on from a prompt, on the packed weights if it is compressed. The text appears as it is made.

    \b
    Example:  compress generate out/demo --prompt "It was a dark night"
    """
    from compress.cli.show import note, out, print_json
    from compress.cli.signals import Ended
    from compress.errors import RecipeError

    chosen = heat(greedy, temperature)
    prompt = sys.stdin.read() if prompt == "-" else prompt
    if not prompt:
        raise RecipeError("--prompt: is empty; give the text to go on from")
    how: dict[str, Any] = check_arithmetic(arithmetic)
    refuse_unfinished(model)
    import torch

    from compress.checkpoint.load import load
    from compress.cli.sizes import check_followed, following, load_options, size_of, sizes
    from compress.pipeline.run import Machine, compute_device

    if quiet or not sys.stderr.isatty():
        hide_bars()
    place = compute_device(Machine(check_device(device)))
    how |= load_options(model, memory_budget, follow_memory, place)
    loaded = load(model, device=place, revision=revision, trust_remote_code=trust_remote_code, **how)
    if not quiet and (size := size_of(loaded)):
        note(size)
    tokenizer = tokenizer_of(loaded, trust_remote_code)
    template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not template:
        raise RecipeError(
            f"--chat: the tokenizer of {model} has no chat template; leave it out for a plain continuation"
        )
    as_message = template if chat is None else chat
    ids = _ids(tokenizer, prompt, as_message)
    if ids.numel() == 0:
        raise RecipeError("--prompt: gives no tokens; use some text")
    n_new = _room(loaded, ids.shape[1], max_new_tokens)
    if n_new < max_new_tokens and not quiet:
        note(f"note: the model has {ids.shape[1] + n_new} positions: at most {n_new} new tokens")
    torch.manual_seed(seed)
    streamer = None if as_json else _streamer(tokenizer, skip_prompt=as_message)
    from compress.runtime.decode import obstacle

    reason = obstacle(loaded)
    if reason is not None and not quiet:
        note(f"note: {reason}: tokens are chosen by transformers' generate, which takes a little longer")
    start = time.perf_counter()
    try:
        with following(loaded, model, memory_budget, follow_memory, quiet) as followed:
            made = _generate(loaded, ids.to(place), n_new, chosen, streamer, ours=reason is None)
    except BrokenPipeError:
        raise Ended(signal.SIGPIPE) from None
    seconds = time.perf_counter() - start
    check_followed(followed)
    new = made[0, ids.shape[1] :]
    if as_json:
        text = tokenizer.decode(new, skip_special_tokens=True)
        about = {"new_tokens": len(new), "seconds": seconds, "chat": as_message, **sizes(loaded, followed)}
        print_json({"prompt": prompt, "text": text, **about})
    elif not quiet:
        out("") if not sys.stdout.isatty() else None
        note(f"{len(new)} tokens in {seconds:.1f} s, {len(new) / seconds:.1f} per second{described(loaded)}")


def described(model: PreTrainedModel) -> str:
    """What quantized layers run on, to be said behind a speed; nothing where there are none."""
    from compress.runtime.prepare import arithmetic

    found = arithmetic(model)
    return f" ({found['kernels']} kernels, {found['activations']} activations)" if found["linears"] else ""


def hide_bars() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


def tokenizer_of(model: PreTrainedModel, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from compress.calibration.data import load_tokenizer

    return load_tokenizer(Path(model.config._name_or_path), trust_remote_code=trust_remote_code)


def _ids(tokenizer: Any, prompt: str, as_message: bool) -> Any:
    """Token ids [1, tokens] of the prompt."""
    import torch

    if not as_message:
        return torch.tensor([tokenizer(prompt)["input_ids"]], dtype=torch.long)
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]], dtype=torch.long)


def _room(model: PreTrainedModel, n_prompt: int, wanted: int) -> int:
    """How many new tokens there are positions for. Raises: RecipeError if there is none."""
    from compress.errors import RecipeError

    limit = positions(model)
    if limit is None:
        return wanted
    if n_prompt >= limit:
        raise RecipeError(f"--prompt: has {n_prompt} tokens, the model {limit} positions; use a shorter one")
    return min(wanted, limit - n_prompt)


def positions(model: PreTrainedModel) -> int | None:
    """The length of the model's context in tokens; None if it has no limit."""
    limit = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None)
    return None if limit is None else int(limit)


def _streamer(tokenizer: Any, skip_prompt: bool) -> Any:
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)


def _generate(model: Any, ids: Any, n_new: int, temperature: float, streamer: Any, *, ours: bool) -> Any:
    """Token ids of prompt and answer [1, tokens]. `ours`: by our own loop, not transformers'."""
    import torch

    from compress.runtime.decode import chooser, decode, end_tokens

    if not ours:
        with torch.inference_mode():
            return model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=n_new,
                streamer=streamer,
                **sampling(temperature),
            )
    if streamer is not None:
        streamer.put(ids.cpu())
    on_token = None if streamer is None else lambda token: streamer.put(token.cpu())
    made = decode(model, ids, n_new, chooser(model, temperature), ends=end_tokens(model), on_token=on_token)
    if streamer is not None:
        streamer.end()
    return made


def sampling(temperature: float) -> dict[str, Any]:
    """What transformers is told to choose tokens by."""
    if temperature > 0:
        return {"do_sample": True, "temperature": temperature}
    return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def heat(greedy: bool, temperature: float | None) -> float:
    """The temperature that --greedy and --temperature come to. Raises: RecipeError if they contradict each other."""
    from compress.errors import RecipeError

    if greedy and temperature:
        raise RecipeError(f"--greedy and --temperature {temperature:g}: choose one")
    return 0.0 if greedy else TEMPERATURE if temperature is None else temperature
