"""GPTQ and AWQ folders that others wrote: what of them is read, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress.checkpoint.foreign import Layout
from compress.checkpoint.stream import StreamedModel
from compress.checkpoint.translate import to_awq, to_gptq, to_ours
from compress.errors import CheckpointError
from compress.kernels.packing import pack
from compress.modules.quantized import QuantizedLinear
from compress.modules.quantized_spec import QuantizedSpec
from tests.checkpoint.folders import quantize_folder
from tests.tiny_models import save_tiny

NAME = "model.layers.1.mlp.up_proj"
IDS = torch.arange(2 * 16).view(2, 16)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A GPTQ or AWQ folder without our checksums, changed by a function of its tensors and its config."""

    def made(format_: str, change: Callable[[dict[str, Any], dict[str, Any]], None], **how: Any) -> Path:
        source = save_tiny("llama", tmp_path / "source", tokenizer=False)
        quantize_folder(source, tmp_path / "q", dtype=torch.bfloat16, **{"group_size": 32, **how})
        out = tmp_path / format_
        compress.export(tmp_path / "q", format_, out)
        (out / "compress_export.json").unlink()
        tensors = load_file(out / "model.safetensors")
        config = json.loads((out / "config.json").read_text())
        change(tensors, config["quantization_config"])
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        (out / "config.json").write_text(json.dumps(config))
        return out

    return made


def same_as_source(out: Path) -> bool:
    return torch.equal(compress.load(out)(IDS).logits, compress.load(out.parent / "q")(IDS).logits)


def settings(**changed: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda tensors, quantization: quantization.update(changed)


@pytest.mark.parametrize(
    "fields",
    [
        {"checkpoint_format": None, "format": None},  # as AutoGPTQ wrote it
        {"desc_act": True, "static_groups": True},
        {"dynamic": {"-:.*lm_head": {}, "+:nothing": {"bits": 8}}},
        {"dynamic": {"+:.*": {"bits": 4, "group_size": 32}}, "bits": 8, "group_size": 64},
        {"bits": 4, "damp_percent": 0.1, "model_name_or_path": None},
    ],
)
def test_configs_of_others(folder: Callable[..., Path], fields: dict[str, Any]):
    assert same_as_source(folder("gptq", settings(**fields)))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' cannot be run here"),
        ({"is_marlin_format": True}, "checkpoint_format 'marlin' cannot be run here"),
        ({"bits": 5}, f"{NAME.replace('1.mlp.up', '0.mlp.down')}: 5 bits of GPTQ cannot be run here"),
        ({"pack_dtype": "int16"}, "pack_dtype 'int16'"),
        ({"group_size": 16}, "config.json describes I32"),
        ({"group_size": None}, "group_size=None"),
        ({"bits": 8}, "qzeros: I32"),
        ({"dynamic": {"-:.*up_proj": {}}}, "0.mlp.up_proj: is stored quantized, though a rule '-:'"),
        ({"dynamic": {"+:(": {}}}, "is no regular expression"),
        ({"dynamic": [1]}, "is not an object"),
        ({"sym": "yes"}, "sym='yes'"),
        ({"quant_method": "awq"}, "model.layers.0.mlp.down_proj: group_size=32 is not a whole number from 1 to 16"),
        ({"quant_method": "exl2"}, "already quantized with 'exl2', which cannot be read here"),
    ],
)
def test_configs_that_cannot_be_run(folder: Callable[..., Path], fields: dict[str, Any], said: str):
    out = folder("gptq", settings(**fields))
    with pytest.raises(CheckpointError) as caught:
        compress.load(out)
    assert said in str(caught.value)
    with pytest.raises(CheckpointError):
        StreamedModel(out)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"version": "gemv"}, "version 'gemv' of AWQ cannot be run here"),
        ({"bits": 8}, "8 bits of AWQ cannot be run here"),
        ({"modules_to_not_convert": ["up_proj"]}, "0.mlp.up_proj: is stored quantized, though"),
        ({"group_size": 16}, "qzeros: I32"),
    ],
)
def test_awq_configs_that_cannot_be_run(folder: Callable[..., Path], fields: dict[str, Any], said: str):
    with pytest.raises(CheckpointError, match=said):
        compress.load(folder("awq", settings(**fields)))


def test_awq_in_the_words_of_autoawq(folder: Callable[..., Path]):
    def change(tensors: dict[str, Any], quantization: dict[str, Any]) -> None:
        quantization.update(w_bit=quantization.pop("bits"), q_group_size=quantization.pop("group_size"), version="GEMM")

    assert same_as_source(folder("awq", change))


def test_gptq_without_g_idx(folder: Callable[..., Path]):
    def change(tensors: dict[str, Any], quantization: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.endswith("g_idx")]:
            del tensors[name]

    assert same_as_source(folder("gptq", change))


def test_groups_in_another_order(folder: Callable[..., Path]):
    """Columns lie together, the scales of their groups in another order: `desc_act` with static groups, sorted."""

    def change(tensors: dict[str, Any], quantization: dict[str, Any]) -> None:
        order = torch.tensor([2, 0, 3, 1])
        name = "model.layers.1.mlp.down_proj"  # four groups
        tensors[f"{name}.g_idx"] = order.repeat_interleave(32).int()
        for part in ("scales", "qzeros"):
            moved = torch.empty_like(tensors[f"{name}.{part}"])
            moved[order] = tensors[f"{name}.{part}"]
            tensors[f"{name}.{part}"] = moved
        quantization["desc_act"] = True

    assert same_as_source(folder("gptq", change, symmetric=False))


@pytest.mark.parametrize("damage", ["mixed", "beyond"])
def test_columns_of_a_group_that_do_not_lie_together(folder: Callable[..., Path], damage: str):
    def change(tensors: dict[str, Any], quantization: dict[str, Any]) -> None:
        index = tensors[f"{NAME}.g_idx"]
        tensors[f"{NAME}.g_idx"] = index.roll(1) if damage == "mixed" else index + 5

    out = folder("gptq", change)
    for use in (compress.load, lambda path: compress.export(path, "dense", path.parent / "dense")):
        with pytest.raises(CheckpointError, match=rf"{NAME}\.g_idx: "):
            use(out)


def test_zero_points_that_the_first_version_cannot_tell(folder: Callable[..., Path]):
    """15, as it is stored, is 16 to some readers and 0 to others."""

    def change(tensors: dict[str, Any], quantization: dict[str, Any]) -> None:
        quantization.update(checkpoint_format="gptq", format="gptq", sym=False)
        for name in [name for name in tensors if name.endswith("qzeros")]:
            tensors[name] = tensors[name] & 0x77777777
        tensors[f"{NAME}.qzeros"][0, 0] = 0x0000000F

    with pytest.raises(CheckpointError, match=rf"{NAME}\.qzeros: a stored zero point of 15 is 0 or 16"):
        compress.load(folder("gptq", change, symmetric=False))


def test_symmetric_that_is_not(folder: Callable[..., Path]):
    def change(tensors: dict[str, Any], quantization: dict[str, Any]) -> None:
        tensors[f"{NAME}.qzeros"][0, 0] = 0x77777767

    with pytest.raises(CheckpointError, match=rf"{NAME}\.qzeros: config.json says sym=true"):
        compress.load(folder("gptq", change))


def test_missing_tensors_are_named(folder: Callable[..., Path]):
    def change(tensors: dict[str, Any], quantization: dict[str, Any]) -> None:
        del tensors[f"{NAME}.scales"]

    with pytest.raises(CheckpointError, match=rf"{NAME}\.scales: is in no file"):
        compress.load(folder("gptq", change))


def test_a_missing_weight_is_named(folder: Callable[..., Path]):
    def change(tensors: dict[str, Any], quantization: dict[str, Any]) -> None:
        del tensors[f"{NAME}.qweight"]

    with pytest.raises(CheckpointError, match=rf"{NAME}\.qweight: is in no file"):
        compress.load(folder("gptq", change))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("less_one", [False, True])
def test_there_and_back(bits: int, less_one: bool):
    spec = QuantizedSpec(64, 32, bits, 16, symmetric=False)
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (32, 64), generator=generator)
    zero = torch.randint(1 if less_one else 0, 2**bits, (32, 4), generator=generator)
    stored = QuantizedLinear.from_codes(codes, torch.rand(32, 4, generator=generator), zero, spec).stored()
    theirs = to_gptq(stored, bits, 16, less_one)
    parts = ("qweight", "qzeros", "scales", "g_idx")
    back = to_ours("x", Layout("gptq", spec, parts, less_one), theirs)
    assert back.keys() == stored.keys()
    assert all(torch.equal(back[name], stored[name]) for name in stored)
    if bits == 4:
        back = to_ours("x", Layout("awq", spec, parts[:3]), to_awq(stored))
        assert all(torch.equal(back[name], stored[name]) for name in stored)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zeros_of_gptqmodel(bits: int):
    """GPTQModel takes one from whole words, in which a zero point of 0 borrows from its neighbour; of 3 bits from each."""
    spec = QuantizedSpec(32, 32, bits, -1, symmetric=False)
    zero = torch.randint(0, 2**bits, (1, 32), generator=torch.Generator().manual_seed(0))
    zero[0, 3:5] = 0
    if bits == 3:
        qzeros = pack((zero - 1) % 8, 3)
    else:
        ones = sum(1 << shift for shift in range(0, 32, bits))
        qzeros = ((pack(zero, bits).long() - ones) & 0xFFFFFFFF).to(torch.int32)
    tensors = {"qweight": torch.zeros(bits, 32, dtype=torch.int32), "qzeros": qzeros, "scales": torch.ones(1, 32)}
    layout = Layout("gptq", spec, ("qweight", "qzeros", "scales"), less_one=True, whole_words=True)
    module = QuantizedLinear(spec, to_ours("x", layout, tensors))
    found = module.zero_points()
    assert found is not None
    assert torch.equal(found.T.long(), zero)
