"""Decoding without `generate` gives what `generate` gives."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from compress.runtime.attention import folded_attention
from compress.runtime.cache import BufferedLayer, buffered_cache
from compress.runtime.decode import chooser, decode, end_tokens, obstacle
from tests.tiny_models import TINY, tiny_model

GREEDY = {"do_sample": False}


def prompt(n: int = 5, batch: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (batch, n), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", list(TINY))
def test_greedy_tokens_are_those_of_generate(family):
    model = tiny_model(family)
    assert obstacle(model) is None
    ids = prompt()
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=14, **GREEDY)
    assert torch.equal(decode(model, ids, 14, chooser(model, 0), ends=end_tokens(model)), expected)


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_k": 0, "top_p": 0.7}, {"min_p": 0.05}])
def test_sampled_tokens_are_those_of_generate_from_the_same_seed(settings):
    model = tiny_model("llama")
    model.generation_config.update(**settings)
    ids = prompt()
    torch.manual_seed(3)
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=True, temperature=0.8
    )
    torch.manual_seed(3)
    assert torch.equal(decode(model, ids, 12, chooser(model, 0.8), ends=end_tokens(model)), expected)


def test_ends_and_stops():
    model = tiny_model("llama")
    whole = decode(model, prompt(), 8, chooser(model, 0))
    seen: list[int] = []
    third = int(whole[0, 7])
    assert third not in whole[0, 5:7].tolist()
    made = decode(model, prompt(), 8, chooser(model, 0), ends={third}, on_token=lambda t: seen.append(int(t)))
    assert made.tolist() == whole[:, :8].tolist()
    assert seen == whole[0, 5:8].tolist()
    assert decode(model, prompt(), 8, chooser(model, 0), stopped=lambda: True).shape == (1, 6)


def test_several_sequences_and_a_cache_that_goes_on():
    model = tiny_model("qwen2")  # sliding windows in two of three blocks
    ids = prompt(6, batch=3)
    whole = decode(model, ids, 9, chooser(model, 0))
    for row in range(3):
        assert torch.equal(decode(model, ids[row : row + 1], 9, chooser(model, 0)), whole[row : row + 1])
    cache = buffered_cache(model, 2)  # too small: it grows
    first = decode(model, ids, 4, chooser(model, 0), cache=cache)
    assert cache.get_seq_length() == 9  # the last token has not been read
    assert torch.equal(decode(model, first, 5, chooser(model, 0), cache=cache), whole)


def test_nothing_is_allocated_for_a_token():
    model = tiny_model("llama")
    cache = buffered_cache(model, 32)
    places: set[int] = set()
    decode(
        model,
        prompt(),
        20,
        chooser(model, 0),
        cache=cache,
        on_token=lambda _: places.add(cache.layers[0].keys.data_ptr()),
    )
    assert len(places) == 1


def test_the_buffered_layer_holds_what_the_dynamic_one_holds():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = BufferedLayer(3), DynamicCache().layer_class_to_replicate()

    def same() -> None:
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(2) == theirs.get_mask_sizes(2)

    def both(call) -> None:
        call(ours)
        call(theirs)
        same()

    for n in (2, 1, 1, 5):
        new = torch.randn(2, 2, n, 4, generator=generator), torch.randn(2, 2, n, 3, generator=generator)
        both(lambda layer, new=new: layer.update(*new))
    both(lambda layer: layer.crop(-4))
    both(lambda layer: layer.update(new[0], new[1]))
    both(lambda layer: layer.reorder_cache(torch.tensor([1, 0])))
    both(lambda layer: layer.update(new[0], new[1]))
    both(lambda layer: layer.batch_select_indices(torch.tensor([1])))
    both(lambda layer: layer.update(new[0][:1], new[1][:1]))
    both(lambda layer: layer.batch_repeat_interleave(2))
    both(lambda layer: layer.update(*new))
    ours.reset(), theirs.reset()
    both(lambda layer: layer.update(*new))


def test_what_only_generate_can_do_is_said():
    model = tiny_model("llama")
    model.generation_config.repetition_penalty = 1.3
    assert obstacle(model) == "its generation_config has repetition_penalty=1.3"
    model = tiny_model("llama")
    own = type("Own", (type(model),), {"generate": lambda self: None})
    model.__class__ = own
    assert obstacle(model) == "Own has a way of its own to generate"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_folded_heads_attend_as_they_did(dtype, masked):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 1, 6, 16, generator=generator).to(dtype).transpose(1, 2)
    key, value = torch.randn(2, 2, 2, 40, 16, generator=generator).to(dtype)[..., :33, :]
    mask = (torch.rand(2, 1, 1, 33, generator=generator) < 0.7) if masked else None
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 3, True
    ours, theirs = (
        attend(module, query, key, value, mask, scaling=0.3)[0] for attend in (folded_attention, sdpa_attention_forward)
    )
    assert ours.shape == theirs.shape == (2, 1, 6, 16)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-2)


def test_attention_is_folded_while_decoding_and_not_after(monkeypatch):
    model = tiny_model("llama_gqa_tied")
    assert model.config._attn_implementation == "sdpa"
    shapes = []
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, *a, **k: shapes.append(q.shape[1:3]) or real(q, *a, **k),
    )
    decode(model, prompt(), 2, chooser(model, 0))
    assert shapes == [(4, 5)] * 3 + [(2, 2)] * 3
    assert model.config._attn_implementation == "sdpa"
