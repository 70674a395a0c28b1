"""A conversation with a model: its messages, held within the context, and replies that appear as they are made.

The keys and values of what the model has read stay between replies, so a turn costs its own tokens only, as long as the
chat template writes the earlier messages as they were.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from compress.cli.generate import positions, sampling
from compress.errors import RecipeError
from compress.runtime.cache import buffered_cache
from compress.runtime.decode import chooser, decode, end_tokens, obstacle

FIRST_CAPACITY = 2048  # tokens that the cache is made for; it grows
RESERVE = 4  # at least a quarter of the context, or --max-new-tokens if that is less, is kept free for the reply


@dataclass(frozen=True)
class Reply:
    """One reply, and what it took. `read`: tokens of the conversation that were not read before."""

    text: str
    tokens: int
    seconds: float
    context: int
    read: int
    stopped: bool


class Conversation:
    """Messages and replies. `stop()` ends the reply that is being made, which then counts as it is."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.system, self.max_new_tokens, self.temperature = system, max_new_tokens, temperature
        self.limit = positions(model)
        self._ours = obstacle(model) is None  # tokens are chosen by our own loop
        self.messages: list[dict[str, str]] = []
        self._read: list[int] = []  # the tokens whose keys and values are in the cache, but for the last
        self._stopped = False
        self._forget()
        self._render([{"role": "user", "content": "Hello"}])  # a template that fails does so before the first question

    def reset(self) -> None:
        """Begin anew, after the same system prompt."""
        self.messages.clear()
        self._forget()

    def undo(self) -> bool:
        """Take back the last question and its reply. Returns: whether there was one."""
        if not self.messages:
            return False
        del self.messages[-2:]
        return True

    def stop(self) -> None:
        self._stopped = True

    def ask(self, question: str, on_text: Callable[[str], None], on_dropped: Callable[[int], None]) -> Reply:
        """Say `question`, and hear the reply.

        Args:
            on_text: called with each piece of the reply.
            on_dropped: called with the number of oldest messages that no longer fit.

        Raises: RecipeError if the question alone does not fit, which leaves the conversation as it was.
        """
        asked = [*self.messages, {"role": "user", "content": question}]
        ids, dropped = self._fit(asked)
        if dropped:
            on_dropped(dropped)
        self.messages = asked[dropped:]
        self._stopped = False
        start = time.perf_counter()
        known = self._remembered(ids)
        collector = _Collector(self.tokenizer, on_text)
        made = self._generate(ids, collector)
        seconds = time.perf_counter() - start
        self._read = made
        self.messages.append({"role": "assistant", "content": collector.text.strip()})
        n_new = len(made) - len(ids)
        return Reply(collector.text, n_new, seconds, len(made), len(ids) - known, self._stopped)

    def _fit(self, messages: list[dict[str, str]]) -> tuple[list[int], int]:
        """The tokens of the conversation without its oldest messages that leave no room, and how many those are."""
        ids = self._render(messages)
        if self.limit is None:
            return ids, 0
        room = self.limit - min(self.max_new_tokens, self.limit // RESERVE)
        dropped = 0
        while len(ids) > room and len(messages) - dropped > 1:
            dropped += 2  # a question and its reply: templates want them to take turns
            ids = self._render(messages[dropped:])
        if len(ids) > room:
            raise RecipeError(
                f"the message takes {len(ids)} tokens with its frame; of the model's {self.limit}, {room} are for messages: "
                f"use a shorter one"
            )
        return ids, dropped

    def _render(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of the messages in the chat template, up to where the reply begins."""
        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        try:
            text = self.tokenizer.apply_chat_template([*head, *messages], tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program; it fails in any way
            said = " ".join(str(error).split())[:200]
            remedy = "leave --system out, or use another --template" if head else "use another --template"
            raise RecipeError(f"the chat template fails ({said}); {remedy}") from None
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _generate(self, ids: list[int], collector: _Collector) -> list[int]:
        n_new = self.max_new_tokens if self.limit is None else min(self.max_new_tokens, self.limit - len(ids))
        given = torch.tensor([ids], dtype=torch.long, device=self.model.device)
        ends = {*end_tokens(self.model), self.tokenizer.eos_token_id} - {None}
        if self._ours:
            collector.put(given)
            choose = chooser(self.model, self.temperature)
            made = decode(
                self.model, given, n_new, choose, ends=ends, cache=self._cache, on_token=collector.put,
                stopped=lambda: self._stopped,
            )  # fmt: skip
            collector.end()
            return list(made[0].tolist())
        criteria = StoppingCriteriaList([_Asked(lambda: self._stopped)])
        with torch.inference_mode():
            made = self.model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=n_new, streamer=collector,
                stopping_criteria=criteria, past_key_values=self._cache, eos_token_id=sorted(ends) or None,
                pad_token_id=self.tokenizer.pad_token_id or next(iter(sorted(ends)), None), **sampling(self.temperature),
            )  # fmt: skip
        return made[0].tolist()

    def _forget(self) -> None:
        self._cache: Cache | None = buffered_cache(self.model, FIRST_CAPACITY) if self._ours else None
        if self._cache is None:
            self._cache = DynamicCache(config=self.model.config)
        self._read = []

    def _remembered(self, ids: list[int]) -> int:
        """How many of `ids` the cache holds. It is emptied unless `ids` go on from all that it holds."""
        assert self._cache is not None
        held = self._cache.get_seq_length()
        if held >= len(ids) or self._read[:held] != ids[:held]:
            self._forget()
            return 0
        return int(held)


class _Asked(StoppingCriteria):
    """Ends a reply when somebody asks for it."""

    def __init__(self, stopped: Callable[[], bool]):
        self.stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.stopped(), dtype=torch.bool, device=input_ids.device)


class _Collector(BaseStreamer):
    """Hands on the text of a reply, token by token; of a character that several tokens make, when the last is there."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]):
        self.tokenizer, self.on_text = tokenizer, on_text
        self.text = ""  # what has been handed on
        self._line: list[int] = []  # the tokens since the last line end, which are decoded together
        self._shown = 0  # characters of that line that have been handed on
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._prompt:  # it comes first, as a whole
            self._prompt = False
            return
        self._line += value.reshape(-1).tolist()
        line = self._decoded()
        if not line.endswith("\ufffd"):
            self._hand_on(line)
            if line.endswith("\n"):
                self._line, self._shown = [], 0

    def end(self) -> None:
        self._hand_on(self._decoded())

    def _decoded(self) -> str:
        text: str = self.tokenizer.decode(self._line, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _hand_on(self, line: str) -> None:
        new, self._shown = line[self._shown :], max(self._shown, len(line))
        self.text += new
        if new:
            self.on_text(new)
