"""Unfused experts: the function of transformers' fused ones, the names on disk, and only experts with tokens run."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping

from compress.models.experts import UnfusedExperts, unfuse_experts, without_expert_converters
from compress.models.families import architecture_of
from tests.tiny_models import tiny_config, tiny_model

MIXTURES = ("mixtral", "qwen3_moe")


def fused_and_unfused(family):
    fused, unfused = tiny_model(family), tiny_model(family)
    unfuse_experts(unfused, architecture_of(unfused.config.to_dict()))
    return fused.model.layers[-1].mlp.experts, unfused.model.layers[-1].mlp.experts


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_unfused_experts_equal_fused_ones(family, implementation):
    fused, unfused = fused_and_unfused(family)
    fused.config._experts_implementation = implementation
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 64, generator=generator)
    weights, index = torch.rand(50, 4, generator=generator).topk(2)
    with torch.no_grad():
        torch.testing.assert_close(unfused(x, index, weights), fused(x, index, weights), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", MIXTURES)
def test_whole_model_gives_equal_logits(family):
    fused, unfused = tiny_model(family), tiny_model(family)
    unfuse_experts(unfused, architecture_of(unfused.config.to_dict()))
    tokens = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(unfused(tokens).logits, fused(tokens).logits, rtol=1e-5, atol=1e-5)


def test_experts_run_in_ascending_order_and_only_with_tokens():
    _, experts = fused_and_unfused("mixtral")
    called = []
    for e, expert in enumerate(experts):
        expert.register_forward_pre_hook(lambda _, args, e=e: called.append((e, args[0].shape[0])))
    index = torch.tensor([[3, 0], [3, 4], [0, 3]])  # 4 means none, as transformers marks experts of another device
    x, weights = torch.randn(3, 64), torch.ones(3, 2)
    out = experts(x, index, weights)
    assert called == [(0, 2), (3, 3)]
    torch.testing.assert_close(out[1], experts[3](x[1]))


def test_dense_blocks_stay():
    model = tiny_model("qwen3_moe")  # block 0 is dense
    unfuse_experts(model, architecture_of(model.config.to_dict()))
    kinds = [isinstance(getattr(layer.mlp, "experts", None), UnfusedExperts) for layer in model.model.layers]
    assert kinds == [False, True, True]


def test_works_on_meta_and_twice():
    config = tiny_config("mixtral")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    arch = architecture_of(config.to_dict())
    unfuse_experts(model, arch)
    experts = model.model.layers[0].mlp.experts
    unfuse_experts(model, arch)
    assert model.model.layers[0].mlp.experts is experts
    assert {p.device.type for p in experts.parameters()} == {"meta"}
    names = set(experts.state_dict())
    assert names == {f"{e}.{role}.weight" for e in range(4) for role in ("w1", "w2", "w3")}


@pytest.mark.parametrize("family", MIXTURES)
def test_only_the_converters_of_experts_are_dropped(family):
    model = tiny_model(family)
    conversions = get_model_conversion_mapping(model)
    left = without_expert_converters(conversions)
    dropped = [c for c in conversions if c not in left]
    assert sorted(t for c in dropped for t in c.target_patterns) == sorted(
        f"{prefix}experts.{name}"
        for prefix in ("." if family == "mixtral" else "mlp.",)
        for name in ("gate_up_proj", "down_proj")
    )
