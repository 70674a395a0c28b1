"""The pass that computes nothing twice gathers what re-running the block for every site would gather."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress.calibration.capture import BlockPass, Gate, OriginalStream, Place
from compress.calibration.store import Allowance, HiddenStates
from compress.checkpoint.stream import StreamedModel, tensors_in
from compress.models.families import module_name
from tests.tiny_models import save_tiny

FAMILIES = [
    "llama",
    "qwen2",
    "gemma2",
    "gemma3_text",
    "opt",
    "gpt2",
    "gpt_neox",
    "gpt_neox_serial",
    "phi3",
    "mixtral",
    "qwen3_moe",
]


class Call:
    def __init__(self, model: StreamedModel, index: int):
        self.model, self.index, self.count = model, index, 0

    def __call__(self, block: nn.Module, batch: int, hidden: Tensor) -> Tensor:
        self.count += 1
        return self.model.call_block(block, self.index, hidden)

    def shared(self, batch: int) -> list[Tensor]:
        return tensors_in(self.model.block_arguments(self.index, (2, 16)))


class Half(nn.Module):
    """Stands for a compressed linear: half of what the original gives."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) / 2


def place_of(model: StreamedModel, name: str) -> Place:
    parent, _, attribute = module_name(model.architecture, name).rpartition(".")
    return model.skeleton.model.get_submodule(parent), attribute


def open_block(folder: Path, index: int, cap: int, scratch: Path) -> tuple[StreamedModel, nn.Module, HiddenStates]:
    model = StreamedModel(folder)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, 250, (2, 16), generator=generator) for _ in range(3)]
    first = model.embed(batches[0])
    hidden = HiddenStates([tuple(first.shape)] * 3, torch.float32, Allowance(cap), scratch)
    for i, ids in enumerate(batches):
        hidden[i] = model.embed(ids)
    return model, model.load_block(index), hidden


def naive(
    model: StreamedModel, block: nn.Module, index: int, hidden: HiddenStates
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Inputs of every site, re-running the whole block for each, compressing site after site."""
    seen: dict[str, Tensor] = {}
    for site in model.architecture.sites(index):
        rows: list[Tensor] = []
        parent, attribute = place_of(model, site.linears[0])
        hook = parent._modules[attribute].register_forward_pre_hook(
            lambda m, args, rows=rows: rows.append(args[0].flatten(0, -2).clone())
        )
        for batch in range(len(hidden)):
            model.call_block(block, index, hidden[batch])
        hook.remove()
        width = model.skeleton.module(site.linears[0]).weight.shape
        seen[site.name] = torch.cat(rows) if rows else torch.empty(0, width[0 if model.architecture.transposed else 1])
        for name in site.linears:
            parent, attribute = place_of(model, name)
            parent._modules[attribute] = Half(parent._modules[attribute])
    return seen, [model.call_block(block, index, hidden[batch]) for batch in range(len(hidden))]


def one_pass(
    model: StreamedModel, block: nn.Module, index: int, hidden: HiddenStates, scratch: Path
) -> tuple[dict[str, Tensor], list[Half], Call]:
    sites = model.architecture.sites(index)
    places = {site.name: [place_of(model, name) for name in site.linears] for site in sites}
    call, seen, halves = Call(model, index), {}, []
    with BlockPass(block, call, hidden, places, scratch, torch.device("cpu")) as run:
        run.start()
        for site in sites:
            rows = [x.clone() for x, _ in run.inputs(site.name)]
            width = model.skeleton.module(site.linears[0]).weight.shape
            seen[site.name] = (
                torch.cat(rows) if rows else torch.empty(0, width[0 if model.architecture.transposed else 1])
            )
            for position in range(len(site.linears)):
                half = Half(run.gates[site.name][position].target)
                halves.append(half)
                run.replace(site.name, position, half)
            run.release(site.name)
        run.finish()
    return seen, halves, call


@pytest.mark.parametrize("cap", [10**9, 0, 5000], ids=["memory", "disk", "both"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_one_pass_sees_what_rerunning_sees(family: str, cap: int, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "model")
    model, block, hidden = open_block(tmp_path / "model", 1, 10**9, tmp_path)
    expected, outputs = naive(model, block, 1, hidden)

    model, block, hidden = open_block(tmp_path / "model", 1, cap, tmp_path)
    seen, halves, call = one_pass(model, block, 1, hidden, tmp_path)
    assert seen.keys() == expected.keys()
    for site in expected:
        torch.testing.assert_close(seen[site], expected[site], rtol=0, atol=0)
    for batch, output in enumerate(outputs):
        torch.testing.assert_close(hidden[batch], output, rtol=0, atol=0)
    assert call.count == 3  # each batch went through the block once …
    assert max(half.calls for half in halves) <= 3  # … and so did each linear
    assert not any(isinstance(module, Gate) for module in block.modules())


@torch.no_grad()
def test_an_abandoned_pass_leaves_no_gate_and_no_greenlet(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    model, block, hidden = open_block(tmp_path / "model", 0, 0, tmp_path)
    before = [hidden[i].clone() for i in range(3)]
    sites = model.architecture.sites(0)
    places = {site.name: [place_of(model, name) for name in site.linears] for site in sites}
    one_pass_only = BlockPass(block, Call(model, 0), hidden, places, tmp_path, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="stop here"), one_pass_only as run:
        run.start()
        run.release(sites[0].name)
        raise RuntimeError("stop here")
    assert not any(isinstance(module, Gate) for module in block.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())
    for i in range(3):
        torch.testing.assert_close(hidden[i], before[i], rtol=0, atol=0)


@pytest.mark.parametrize("cap", [10**9, 0], ids=["memory", "disk"])
@torch.no_grad()
def test_the_original_stream_arrives_beside_the_compressed_one(cap: int, tmp_path: Path) -> None:
    import copy

    save_tiny("llama_gqa_tied", tmp_path / "model")
    model, block, hidden = open_block(tmp_path / "model", 1, cap, tmp_path)
    _, _, original = open_block(tmp_path / "model", 1, cap, tmp_path)
    unchanged = copy.deepcopy(block)
    expected: dict[str, list[Tensor]] = {}
    for name, module in unchanged.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda m, a, n=name: expected.setdefault(n, []).append(a[0].flatten(0, -2).clone())
            )
    outputs = [model.call_block(unchanged, 1, original[i]) for i in range(3)]
    for module in unchanged.modules():
        module._forward_pre_hooks.clear()

    paths = {id(module): path for path, module in block.named_modules()}
    stream = OriginalStream(
        unchanged,
        Call(model, 1),
        original,
        lambda p: (unchanged.get_submodule(paths[id(p[0])]), p[1]),
        tmp_path,
        torch.device("cpu"),
    )
    sites = model.architecture.sites(1)
    places = {site.name: [place_of(model, name) for name in site.linears] for site in sites}
    with BlockPass(block, Call(model, 1), hidden, places, tmp_path, torch.device("cpu"), stream) as run:
        run.start()
        for site in sites:
            relative = site.linears[0].removeprefix(f"{model.architecture.blocks[1]}.")
            pairs = [(x.clone(), o.clone()) for x, o in run.inputs(site.name) if o is not None]
            for (_, found), wanted in zip(pairs, expected[relative], strict=True):
                torch.testing.assert_close(found, wanted, rtol=0, atol=0)
            for position in range(len(site.linears)):
                run.replace(site.name, position, Half(run.gates[site.name][position].target))
            run.release(site.name)
        run.finish()
    stream.finish()
    for i in range(3):
        torch.testing.assert_close(original[i], outputs[i], rtol=0, atol=0)
