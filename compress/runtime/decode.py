"""Decoding without what `generate` of transformers does beside the model: one forward for the prompt, then one a token.

The tokens are those that `generate` chooses, greedy or sampled (from the same seed); where it is asked for more than that
(penalties, beams, …) or the model's cache is of a kind of its own, `obstacle` says so, and it has to be used itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from compress.runtime.attention import folding
from compress.runtime.cache import buffered_cache
from compress.runtime.steps import stepping

Choose = Callable[[Tensor], Tensor]  # logits float32 [batch, vocabulary] -> tokens [batch]

# Settings of a model's generation_config that are heeded here, or that say nothing about the choice of tokens.
HEEDED = {
    "temperature", "top_k", "top_p", "min_p", "do_sample", "eos_token_id", "bos_token_id", "pad_token_id",
    "decoder_start_token_id", "max_length", "max_new_tokens", "use_cache", "transformers_version", "trust_remote_code",
}  # fmt: skip
NEUTRAL = {  # what other settings come to where nobody asks for anything
    "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "typical_p": 1.0, "repetition_penalty": 1.0,
    "length_penalty": 1.0, "encoder_repetition_penalty": 1.0, "guidance_scale": 1.0, "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.4, "assistant_lookbehind": 10,
    "target_lookbehind": 10,
}  # fmt: skip
TOP_K = 50  # what transformers takes where neither user nor model says anything


def obstacle(model: PreTrainedModel) -> str | None:
    """Why this model has to be decoded by transformers' `generate`; None if `decode` gives the same tokens."""
    if not isinstance(model, GenerationMixin) or type(model).generate is not GenerationMixin.generate:
        return f"{type(model).__name__} has a way of its own to generate"
    usual = {**GenerationConfig().to_dict(), **NEUTRAL}
    for name, value in model.generation_config.to_dict().items():  # type: ignore[union-attr]
        if value and name not in HEEDED and not name.startswith("_") and value != usual.get(name):
            return f"its generation_config has {name}={value!r:.60}"
    if buffered_cache(model, 1) is None:
        return f"the cache of {model.config.model_type} is not one of keys and values alone"
    return None


def chooser(model: PreTrainedModel, temperature: float) -> Choose:
    """How the next token is chosen: the likeliest, or drawn as `generate` draws it with the model's own top_k, top_p, min_p."""
    if temperature == 0:
        return lambda logits: logits.argmax(-1)
    settings: Any = model.generation_config
    top_k = TOP_K if settings.top_k is None else settings.top_k
    warpers: list[Any] = [] if temperature == 1 else [TemperatureLogitsWarper(temperature)]
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if settings.top_p is not None and settings.top_p < 1:
        warpers.append(TopPLogitsWarper(settings.top_p))
    if settings.min_p is not None:
        warpers.append(MinPLogitsWarper(settings.min_p))

    def draw(logits: Tensor) -> Tensor:
        for warp in warpers:
            logits = warp(None, logits)
        return torch.multinomial(logits.softmax(-1), 1).squeeze(1)

    return draw


def decode(
    model: PreTrainedModel,
    ids: Tensor,
    n_new: int,
    choose: Choose,
    *,
    ends: Collection[int] = (),
    cache: Cache | None = None,
    on_token: Callable[[Tensor], object] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Tensor:
    """Go on from `ids`.

    Args:
        ids: [batch, tokens], no padding; a batch of one where `ends` are given.
        n_new: at most so many new tokens.
        ends: tokens after which nothing comes.
        cache: of `buffered_cache`, with the keys and values of the first of `ids` (not of all); None: a new one.
        on_token: called with each new token [batch].
        stopped: asked after each token whether to stop.

    Returns: [batch, tokens + new tokens].
    """
    batch, n_given = ids.shape
    assert batch == 1 or not ends
    made = ids.new_empty(batch, n_given + n_new)
    made[:, :n_given] = ids
    if cache is None:
        cache = buffered_cache(model, n_given + n_new)
        assert cache is not None, "see `obstacle`"
    read, length = cache.get_seq_length(), n_given
    with torch.inference_mode(), folding(model), stepping(model):
        while length < n_given + n_new:
            out = model(input_ids=made[:, read:length], past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = choose(out.logits[:, -1].float())
            made[:, length] = token
            read, length = length, length + 1
            if on_token is not None:
                on_token(token)
            if (ends and int(token) in ends) or stopped():
                break
    return made[:, :length]


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """The tokens at which `generate` stops."""
    ends: Any = model.generation_config.eos_token_id  # type: ignore[union-attr]
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
