"""Single tokens that take the short way through packed blocks: the same arithmetic, and only where nothing is unusual."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from compress.kernels import native
from compress.kernels.choice import Choice
from compress.models.families import architecture_of
from compress.modules.low_rank import LowRankLinear
from compress.modules.quantized import QuantizedLinear
from compress.modules.quantized_spec import QuantizedSpec
from compress.runtime.cache import buffered_cache
from compress.runtime.decode import chooser, decode
from compress.runtime.prepare import pack_model
from compress.runtime.steps import stepping
from tests.tiny_models import tiny_model

ABSENT = native.absent()
pytestmark = pytest.mark.skipif(ABSENT is not None, reason=f"no compiled kernels: {ABSENT}")


@pytest.fixture(autouse=True)
def packing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMPRESS_PACK", raising=False)


def packed(family: str, dtype: torch.dtype = torch.float32, activations: str = "float", factored: str = "nothing"):
    """A tiny model whose linears have random codes of 8 bits, packed; those whose names hold `factored` as two factors."""
    model = tiny_model(family).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and factored in name:
            rank = min(linear.weight.shape) // 2
            left = torch.zeros(linear.out_features, rank, dtype=dtype)
            bias = (
                None if linear.bias is None else torch.randn(linear.out_features, generator=generator).to(dtype) * 0.1
            )
            right = torch.zeros(rank, linear.in_features, dtype=dtype)
            model.set_submodule(name, LowRankLinear.from_factors(left, right, bias))
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and not name.endswith("lm_head"):
            spec = QuantizedSpec(linear.in_features, linear.out_features, 8, -1)
            words = (linear.out_features, -(-linear.in_features // 4))
            stored = {
                "weight_packed": torch.randint(-(2**31), 2**31, words, dtype=torch.int32, generator=generator),
                "weight_scale": torch.full((linear.out_features, 1), 0.002, dtype=dtype),
                "weight_shape": torch.tensor([linear.out_features, linear.in_features]),
            }
            if linear.bias is not None:
                stored["bias"] = torch.randn(linear.out_features, generator=generator).to(dtype) * 0.1
            model.set_submodule(name, QuantizedLinear(spec, stored))
    pack_model(model, Choice("auto", activations), architecture_of(model.config.to_dict()))
    return model


def logits_of(model, n_steps: int = 4):
    """Of some tokens after a prompt, one by one."""
    ids = torch.randint(0, 256, (1, 6), generator=torch.Generator().manual_seed(1))
    cache = buffered_cache(model, 16)

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        return model(tokens, past_key_values=cache, use_cache=True).logits[0, -1].float()

    with torch.inference_mode():
        logits(ids)
        return torch.stack([logits(ids[:, i : i + 1]) for i in range(n_steps)]), cache


@pytest.mark.parametrize("factored", ["nothing", "proj", "q_proj"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize(
    ("dtype", "activations"), [(torch.float32, "float"), (torch.float32, "int8"), (torch.bfloat16, "int8")]
)
def test_the_short_way_computes_what_the_modules_compute(family, dtype, activations, factored):
    model = packed(family, dtype, activations, factored)
    wanted, cache = logits_of(model)
    with stepping(model) as n_blocks:
        found, other = logits_of(model)
    assert n_blocks == len(model.model.layers)
    assert other.get_seq_length() == cache.get_seq_length()
    # a number that falls on the other side of a rounding step of the activations moves the logits by a part of that step
    part = {("float", torch.float32): 1e-5, ("int8", torch.float32): 2e-2}.get((activations, dtype), 5e-2)
    assert (found - wanted).norm() <= part * wanted.norm()
    assert not any("forward" in block.__dict__ for block in model.model.layers)


def test_decoding_takes_it_and_gives_the_same_tokens(monkeypatch):
    model, taken = packed("llama"), []
    monkeypatch.setattr("compress.runtime.steps.Step.__call__", counted := _counting(taken))
    ids = torch.randint(0, 256, (1, 5), generator=torch.Generator().manual_seed(1))
    quick = decode(model, ids, 12, chooser(model, 0))
    assert len(taken) == 11 * len(model.model.layers) and counted
    usual = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert torch.equal(quick, usual)
    with stepping(model):
        hidden = decode(model, ids.repeat(2, 1), 3, chooser(model, 0))  # two sequences: the usual way
    assert torch.equal(hidden[0], quick[0, :8])


def _counting(taken: list[int]):
    from compress.runtime.steps import Step

    usual = Step.__call__

    def counted(self, *arguments):
        taken.append(self.layer)
        return usual(self, *arguments)

    return counted


def test_a_cache_that_is_full_grows_the_usual_way():
    model = packed("llama")
    ids = torch.randint(0, 256, (1, 5), generator=torch.Generator().manual_seed(1))
    small, large = (decode(model, ids, 9, chooser(model, 0), cache=buffered_cache(model, n)) for n in (2, 64))
    assert torch.equal(small, large)


def test_whoever_is_listened_to_or_changed_goes_the_usual_way():
    model = packed("llama")
    layers = model.model.layers
    heard: list[int] = []
    handle = layers[0].mlp.register_forward_hook(lambda *_: heard.append(1))
    layers[1].self_attn.k_proj.unpack()
    with stepping(model) as n_blocks:
        assert n_blocks == len(layers) - 2
        logits_of(model)
    assert len(heard) == 5
    handle.remove()
    assert packed_elsewhere(model) == len(layers) - 1


def packed_elsewhere(model) -> int:
    """How many blocks another thread would take while this one has none: the buffers belong to the thread that made them."""
    found: list[int] = []

    def work() -> None:
        with stepping(model) as n_blocks:
            found.append(n_blocks)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


def test_other_families_are_left_alone():
    model = packed("gemma2") if "gemma2" in _families() else packed("gpt2")
    with stepping(model) as n_blocks:
        assert n_blocks == 0


def _families() -> tuple[str, ...]:
    from tests.tiny_models import TINY

    return tuple(TINY)
