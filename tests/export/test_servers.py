"""What servers do not run well is said: the rule, and the layers in few words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import compress
from tests.checkpoint.folders import in_blocks, quantize_folder
from tests.export.conftest import all_linears
from tests.tiny_models import save_tiny


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shapes that Marlin runs: in divisible by 128; q, k and v together by 64."""
    return save_tiny(
        "llama", tmp_path_factory.mktemp("wide") / "source", tokenizer=False,
        hidden_size=128, head_dim=32, intermediate_size=256, num_hidden_layers=2, num_key_value_heads=1,
    )  # fmt: skip


@pytest.fixture
def warnings(wide: Path, tmp_path: Path) -> Callable[..., list[str]]:
    def made(format_: str, source: Path = wide, **how: object) -> list[str]:
        settings = {"dtype": torch.bfloat16, "group_size": 32, **how}
        folder = quantize_folder(source, tmp_path / "q", **settings)  # type: ignore[arg-type]
        return compress.export(folder.path, format_, tmp_path / "out")["warnings"]

    return made


@pytest.mark.parametrize("format_", ["gptq", "awq", "compressed-tensors", "dense"])
def test_nothing_is_said_where_nothing_is_odd(warnings, format_: str):
    assert warnings(format_) == []


def test_whole_rows_are_fine(warnings):
    assert warnings("gptq", group_size=-1) == []


RULES = "layers left out, or with settings of their own: GPTQModel, vLLM and SGLang read the rules"


def test_mixed_settings_in_fused_layers(warnings):
    said, rules = warnings("gptq", bits=lambda n: 8 if "k_proj" in n else 4)
    assert rules.startswith(RULES)
    assert said.startswith("mixed settings inside layers that servers fuse")
    assert said.endswith(
        "model.layers.[0-1].self_attn.k_proj, model.layers.[0-1].self_attn.q_proj, model.layers.[0-1].self_attn.v_proj"
    )


def test_a_fused_layer_that_is_quantized_in_part(warnings):
    said, rules = warnings("gptq", select=lambda n, s: in_blocks(n, s) and "up_proj" not in n)
    assert rules.startswith(RULES)
    assert "mixed settings" in said
    assert "model.layers.[0-1].mlp.gate_proj, model.layers.[0-1].mlp.up_proj" in said


def test_different_bits_in_layers_of_their_own_are_fine_for_servers(warnings):
    (said,) = warnings("gptq", bits=lambda n: 8 if "down_proj" in n else 4)
    assert said.startswith(RULES)


def test_layers_left_out_are_fine_for_servers(warnings):
    (said,) = warnings("gptq", select=lambda n, s: in_blocks(n, s) and "o_proj" not in n)
    assert said.startswith(RULES)


def test_awq_says_what_it_leaves_out_in_a_way_that_all_know(warnings):
    assert warnings("awq", select=lambda n, s: in_blocks(n, s) and "o_proj" not in n) == []


def test_group_sizes(warnings):
    (said,) = warnings("gptq", group_size=16)
    assert said.startswith(
        "groups of 16: Marlin kernels run 32, 64, 128 or whole rows: model.layers.[0-1].mlp.down_proj"
    )


def test_bits(warnings):
    (said,) = warnings("gptq", bits=3)
    assert said.startswith("3 bits: the fast kernels of servers run 4 and 8; the slower GPTQ kernels of vLLM read it")


def test_bits_of_compressed_tensors(warnings):
    (said,) = warnings("compressed-tensors", bits=6)
    assert said.startswith("6 bits: the fast kernels of servers run 4 and 8; servers may not read it: ")


def test_quantized_heads(warnings):
    (said,) = warnings("gptq", select=all_linears)
    assert said.startswith("quantized head: ") and said.endswith(": lm_head")
    assert "transformers fills it with random numbers" in said


def test_asymmetric_grids(warnings):
    (said,) = warnings("gptq", symmetric=False)
    assert said.startswith("asymmetric grids: Marlin runs symmetric GPTQ only; others go by checkpoint_format gptq_v2")


def test_asymmetric_awq_is_what_awq_is(warnings):
    assert warnings("awq", symmetric=False) == []


def test_shapes(warnings, tmp_path: Path):
    source = save_tiny("llama", tmp_path / "narrow", tokenizer=False, intermediate_size=160)
    (said,) = warnings("gptq", source)
    assert said.startswith("shapes: Marlin kernels want out divisible by 64 and in by 128")


def test_float32(warnings):
    rounded, said = warnings("gptq", dtype=torch.float32)
    assert rounded.startswith("scales are rounded")
    assert said.startswith("config.json says float32")


def test_experts_with_several_settings(warnings, tmp_path: Path):
    source = save_tiny("qwen3_moe", tmp_path / "experts", tokenizer=False)
    found = warnings("gptq", source, bits=lambda n: 8 if ".experts.1." in n else 4)
    assert any(said.startswith("mixed settings") and "experts" in said for said in found)
    assert any(
        said.startswith("GPTQModel 7.6 does not load this family (qwen3_moe): it takes every block") for said in found
    )
