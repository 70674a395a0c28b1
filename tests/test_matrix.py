"""Method x property: what must hold for every method, on a small real run. A new one joins with a line in CASES."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.pipeline.progress import Silent
from compress.pipeline.run import Machine, RunResult, run
from compress.recipe import Recipe
from tests.runs import fingerprints, recipe_for
from tests.tiny_models import save_tiny


@dataclass(frozen=True)
class Case:
    """One method with settings that fit a model of width 64. `finer` are settings that must lose less; `kl`: to the original,
    at most (of logits over 288 tokens that know nothing it is about 5)."""

    name: str
    steps: list[dict[str, Any]]
    finer: list[dict[str, Any]] = field(default_factory=list)
    model: str = "llama_gqa_tied"
    kl: float = 0.5

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("rtn", [{"rtn": {"bits": 4, "group_size": 32}}], [{"rtn": {"bits": 8, "group_size": 32}}]),
    Case("rtn_asymmetric_mse", [{"rtn": {"bits": 3, "group_size": 32, "symmetric": False, "clip": "mse"}}]),
    Case("gptq", [{"gptq": {"bits": 4, "group_size": 32}}], [{"gptq": {"bits": 6, "group_size": 32}}]),
    Case("gptq_act_per_row", [{"gptq": {"bits": 5, "group_size": -1, "order": "act"}}]),
    Case("gptaq", [{"gptq": {"bits": 3, "group_size": 32, "gptaq": 0.25}}]),
    Case("rtn_then_gptq", [{"rtn": {"bits": 8, "group_size": 32}}, {"gptq": {"bits": 4, "group_size": 32}}]),
    Case(
        "mixed_bits",
        [{"gptq": {"bits": 4, "group_size": 32}, "overrides": {"*.down_proj": {"bits": 8}}, "skip": ["*.0.*.o_proj"]}],
    ),
    Case("with_head", [{"gptq": {"bits": 4, "group_size": 32}, "layers": ["*_proj", "lm_head"]}], model="llama"),
    Case("conv1d", [{"gptq": {"bits": 4, "group_size": 32}}], model="gpt2"),
    Case("experts", [{"gptq": {"bits": 4, "group_size": 32}}], model="mixtral"),
    Case("lut", [{"lut": {"bits": 3, "group_size": 32, "refit": 1, "match": 0.5}}]),
    Case(
        "lut_rows_conv1d_head",
        [{"lut": {"bits": 2, "refit": 1}, "layers": ["*.c_*", "lm_head"]}],
        model="gpt2",
        kl=0.8,
    ),
    Case(
        "svd_then_lut",
        [{"svd": {"keep_ratio": 0.9}}, {"lut": {"table": "normal_float", "group_size": 8, "refit": 0}}],
        model="llama",
    ),
    Case(
        "signround",
        [{"signround": {"bits": 3, "group_size": 32, "iterations": 3, "batch_rows": 2, "signed_scales": True}}],
        [{"signround": {"bits": 5, "group_size": 32, "iterations": 3, "batch_rows": 2, "signed_scales": True}}],
    ),
    Case(
        "signround_original_inputs_head_conv1d",
        [
            {
                "signround": {"bits": 4, "group_size": 32, "iterations": 2, "inputs": "original", "symmetric": False},
                "layers": ["*.c_*", "lm_head"],
            }
        ],
        model="gpt2",
    ),
    Case(
        "cbq",
        [{"cbq": {"bits": 3, "group_size": 32, "iterations": 3, "batch_rows": 2, "window": 3, "overlap": 2}}],
    ),
    Case(
        "cbq_low_rank_strides_conv1d",
        [
            {
                "cbq": {
                    "bits": 4,
                    "group_size": 32,
                    "iterations": 2,
                    "parametrization": "low_rank",
                    "window": 2,
                    "overlap": 0,
                },
                "skip": "*.1.*.c_fc",
            }
        ],
        model="gpt2",
    ),
    Case(
        "signround_experts",
        [{"signround": {"bits": 4, "group_size": 32, "start": "rtn", "iterations": 2}}],
        model="mixtral",
    ),
    Case(
        "lqer_data_free_conv1d_head",
        [
            {
                "lqer": {"bits": 4, "group_size": 32, "quantizer": "rtn", "objective": "plain", "bits_per_weight": 6},
                "layers": ["*.c_*", "lm_head"],
            }
        ],
        model="gpt2",
    ),
    Case(
        "lq_lora",
        [
            {
                "lq_lora": {
                    "bits": 2,
                    "group_size": 32,
                    "rank": 4,
                    "rounds": 3,
                    "first": "low_rank",
                    "signed_scales": True,
                }
            }
        ],
        [{"lq_lora": {"bits": 3, "group_size": 32, "rank": 4, "rounds": 3, "factor_bits": 16, "refit": 0.5}}],
    ),
    Case(
        "lq_signround",
        [{"lq_signround": {"bits": 3, "group_size": 32, "rank": 4, "iterations": 2, "batch_rows": 2}}],
    ),
    Case(
        "lqer_then_gptq",
        [
            {"lqer": {"bits": 4, "group_size": 32, "rank": 12, "factor_bits": 16}},
            {"gptq": {"bits": 6, "group_size": 8}},
        ],
        model="llama",
    ),
    Case(
        "dobi_svd",
        [{"dobi_svd": {"keep_ratio": 0.7, "steps": 4, "learning_rate": 0.05}}],
        [{"dobi_svd": {"keep_ratio": 0.9, "steps": 0}}],
    ),
    Case("dobi_svd_conv1d_head", [{"dobi_svd": {"keep_ratio": 0.8}, "layers": ["*.c_*", "lm_head"]}], model="gpt2"),
    Case("dobi_svd_experts", [{"dobi_svd": {"keep_ratio": 0.8, "steps": 2}}], model="mixtral"),
    Case(
        "dobi_svd_then_gptq",
        [
            {"dobi_svd": {"keep_ratio": 0.9, "steps": 3, "remap": False}},
            {"gptq": {"bits": 4, "group_size": 8}},
        ],
        model="llama",
    ),
    Case("svd", [{"svd": {"keep_ratio": 0.7}}], [{"svd": {"keep_ratio": 0.9}}]),
    Case("svd_refit", [{"svd": {"keep_ratio": 0.7, "refit": 0.5}}]),
    Case("svd_conv1d_head", [{"svd": {"keep_ratio": 0.8}, "layers": ["*.c_*", "lm_head"]}], model="gpt2"),
    Case("svd_experts", [{"svd": {"keep_ratio": 0.8}}], model="mixtral"),
    Case("svd_loss", [{"svd": {"keep_ratio": 0.7, "allocation": "loss"}}]),
    Case(
        "svd_heavy_tail", [{"svd": {"keep_ratio": 0.8, "allocation": "heavy_tail", "objective": "plain"}}], model="gpt2"
    ),
    Case(
        "svd_loss_refit_then_gptq",
        [
            {"svd": {"keep_ratio": 0.9, "allocation": "loss", "refit": 0.5}},
            {"gptq": {"bits": 4, "group_size": 8}},
        ],
        model="llama",
    ),
    Case("laser", [{"laser": {"rate": 0.9}}]),
    Case("laser_conv1d", [{"laser": {"rate": 0.5}, "layers": "*.c_proj"}], model="gpt2"),
    Case("laser_then_rtn", [{"laser": {"rate": 0.9}}, {"rtn": {"bits": 8, "group_size": 32}}]),
    Case(
        "svd_then_gptq",
        [{"svd": {"keep_ratio": 0.8}, "layers": ["*_proj", "lm_head"]}, {"gptq": {"bits": 4, "group_size": 8}}],
        model="llama",
    ),
    Case(
        "cur",
        [{"cur": {"keep_ratio": 0.7, "heal": 1.0}, "layers": ["*.q_proj", "*.k_proj"]}],
        [{"cur": {"keep_ratio": 0.95, "heal": 1.0}, "layers": ["*.q_proj", "*.k_proj"]}],
    ),
    Case(
        "cur_blocks_energy",
        [{"cur": {"energy": 0.95, "n_blocks": 1, "selection": "qr"}, "layers": ["*.q_proj", "*.down_proj"]}],
    ),
    Case("cur_conv1d", [{"cur": {"selection": "deim", "heal": 1.0}, "layers": ["*.c_attn"]}], model="gpt2"),
    Case("cur_experts", [{"cur": {"keep_ratio": 0.8}}], model="mixtral"),
    Case("cur_then_gptq", [{"cur": {"keep_ratio": 0.8}}, {"gptq": {"bits": 4, "group_size": 8}}], model="llama"),
    Case(
        "rotate_then_gptq",
        [{"rotate": {}}, {"gptq": {"bits": 4, "group_size": 32}}],
        [{"rotate": {}}, {"gptq": {"bits": 6, "group_size": 32}}],
    ),
    Case("rotate_online", [{"rotate": {"online": ["mlp", "attention"]}}, {"rtn": {"bits": 5, "group_size": 32}}]),
    Case("rotate_conv1d", [{"rotate": {"r1": "orthogonal"}}, {"gptq": {"bits": 4, "group_size": 32}}], model="gpt2"),
    Case(
        "rotate_learned_experts",
        [{"rotate": {"learn": 2, "candidates": 2, "group_size": 32}}, {"gptq": {"bits": 4, "group_size": 32}}],
        model="mixtral",
    ),
    Case("slicegpt", [{"slicegpt": {"sparsity": 0.25}}], [{"slicegpt": {"sparsity": 0.125}}]),
    Case("slicegpt_conv1d_pca", [{"slicegpt": {"keep_ratio": 0.9, "orientation": "pca"}}], model="gpt2"),
    Case("slicegpt_experts", [{"slicegpt": {"sparsity": 0.25, "slice_head": True}}], model="qwen3_moe"),
    Case(
        "slicegpt_then_gptq",
        [{"slicegpt": {"sparsity": 0.25}}, {"gptq": {"bits": 4, "group_size": 16}}],
        model="llama",
    ),
    Case("cur_then_rtn", [{"cur": {}, "layers": ["*.q_proj", "*.k_proj"]}, {"rtn": {"bits": 8, "group_size": 8}}]),
    Case("prune", [{"prune": {}}], [{"prune": {"pattern": "3:4"}}], kl=0.8),
    Case("prune_wanda_n_m", [{"prune": {"score": "wanda", "pattern": "5:8"}}]),
    Case("prune_unstructured", [{"prune": {"score": "nowag", "sparsity": 0.3}}]),
    Case("prune_joint", [{"prune": {"sparsity": 0.4, "bits": 5, "group_size": 32}}]),
    Case("prune_conv1d_head", [{"prune": {}, "layers": ["*.c_*", "lm_head"]}], model="gpt2"),
    Case("prune_experts", [{"prune": {"score": "magnitude"}}], model="mixtral"),
    Case("prune_then_gptq", [{"prune": {}}, {"gptq": {"bits": 4, "group_size": 32, "order": "gar"}}], model="llama"),
    Case("prune_unstructured_then_rtn", [{"prune": {"sparsity": 0.3}}, {"rtn": {"bits": 6, "group_size": 16}}]),
    Case(
        "svd_prune_gptq",
        [
            {"svd": {"keep_ratio": 0.9}},
            {"prune": {"pattern": "6:8"}},
            {"gptq": {"bits": 5, "group_size": 8}, "skip": "*.down_proj"},
        ],
        model="llama",
    ),
    Case(
        "armor",
        [{"armor": {"block_size": 4, "n_iters": 10}}],
        [{"armor": {"block_size": 8, "n_iters": 60, "step": "sequential"}}],
        kl=2.5,
    ),
    Case("armor_conv1d", [{"armor": {"block_size": 4, "n_iters": 5, "step": "sequential"}}], model="gpt2", kl=2.5),
    Case("armor_experts", [{"armor": {"block_size": 4, "out_block_size": 8, "n_iters": 2}}], model="mixtral", kl=2.5),
    Case(
        "armor_then_gptq",
        [{"armor": {"block_size": 8, "n_iters": 5}}, {"gptq": {"bits": 4, "group_size": 32}}],
        model="llama",
        kl=2.5,
    ),
    Case("cospadi", [{"cospadi": {"keep_ratio": 0.7}}], [{"cospadi": {"keep_ratio": 0.9}}]),
    Case("cospadi_ksvd_conv1d", [{"cospadi": {"engine": "ksvd", "rounds": 3, "start": "columns"}}], model="gpt2"),
    Case("cospadi_shared_experts", [{"cospadi": {"share": 3}, "layers": "*.experts.0.*"}], model="mixtral"),
    Case(
        "cospadi_shared_then_gptq",
        [{"cospadi": {"keep_ratio": 0.9, "share": 2}}, {"gptq": {"bits": 6, "group_size": 8}}],
        model="llama",
        kl=0.8,
    ),
    Case(
        "bitstack",
        [{"bitstack": {"rank": 2, "blocks": 4, "rows": 2, "file_mib": 0.01}}],
        [{"bitstack": {"rank": 2, "blocks": 6, "rows": 2, "file_mib": 0.01}}],
    ),
    Case(
        "bitstack_levels_head_conv1d",
        [
            {
                "bitstack": {"rank": 2, "blocks": 3, "order": "levels", "rows": 1, "file_mib": 0.02},
                "layers": ["*.c_*", "lm_head"],
            }
        ],
        model="gpt2",
    ),
    Case(
        "bitstack_without_data",
        [{"bitstack": {"rank": 1, "blocks": 4, "scaling": False, "exact": True}}],
        model="llama",
    ),
    Case(
        "bitstack_experts",
        [{"bitstack": {"rank": 2, "blocks": 3, "rows": 1}, "layers": ["*.experts.0.*", "*.o_proj"]}],
        model="mixtral",
    ),
    Case("drop_blocks", [{"drop_blocks": {"n_drop": 1, "rows": 4}}], kl=2.5),
    Case(
        "drop_blocks_taylor_then_gptq",
        [
            {"drop_blocks": {"n_drop": 1, "score": "taylor", "protect": [0, 0]}},
            {"gptq": {"bits": 4, "group_size": 32}},
        ],
        kl=2.5,
    ),
    Case(
        "drop_blocks_then_svd",
        [{"drop_blocks": {"n_drop": 1, "selection": "iterative"}}, {"svd": {"keep_ratio": 0.8}}],
        model="gpt2",
        kl=1.5,
    ),
    Case(
        "drop_blocks_experts",
        [
            {"drop_blocks": {"keep_ratio": 0.7, "score": "angular_distance"}},
            {"rtn": {"bits": 8, "group_size": 32}},
        ],
        model="qwen3_moe",
    ),
]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Any:
    """`runs(case)`: the source folder and the result of a case, made once."""
    made: dict[str, tuple[Path, RunResult]] = {}

    def get(case: Case) -> tuple[Path, RunResult]:
        if case.name not in made:
            source = tmp_path_factory.mktemp("source") / case.model
            save_tiny(case.model, source)
            made[case.name] = (
                source,
                run(recipe_for(source, case.steps, text), tmp_path_factory.mktemp("out") / "result"),
            )
        return made[case.name]

    return get


matrix = pytest.mark.parametrize("case", CASES, ids=str)


@matrix
def test_size_reported_is_size_on_disk(case: Case, runs: Any) -> None:
    _, result = runs(case)
    from compress.checkpoint.headers import read_headers

    infos = read_headers(result.folder)
    for layer in result.report["layers"]:
        stored = [i.nbytes for n, i in infos.items() if n.startswith(f"{layer['name']}.") and not n.endswith(".bias")]
        assert sum(stored) == layer["bytes_after"] == result.plan.layers[layer["name"]].spec.nbytes("F32")
    assert sum(i.nbytes for i in infos.values()) == result.plan.bytes_total_after
    assert result.report["bytes_on_disk_weights"] == sum(f.stat().st_size for f in result.folder.glob("*.safetensors"))


@matrix
def test_nothing_but_the_result_is_left(case: Case, runs: Any) -> None:
    _, result = runs(case)
    names = {f.name for f in result.folder.iterdir()}
    assert {"config.json", "recipe.yaml", "README.md", "compress_report.json", "tokenizer.json"} <= names
    assert not any(name.endswith(".partial") or name.startswith(".") for name in names)
    assert Recipe.load(result.folder / "recipe.yaml").hash() == result.plan.recipe.hash()
    json.loads((result.folder / "compress_report.json").read_text())


@matrix
def test_loads_generates_and_equals_what_was_streamed(case: Case, runs: Any) -> None:
    """The model that `compress.load` gives computes the logits that the evaluation, block by block, computed."""
    import compress
    from compress.checkpoint.stream import StreamedModel

    _, result = runs(case)
    model = compress.load(result.folder)
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    streamed = StreamedModel(result.folder)
    with torch.no_grad():
        hidden = streamed.embed(ids)
        for index in range(streamed.n_blocks):
            hidden = streamed.call_block(streamed.load_block(index), index, hidden)
            streamed.unload_block(index)
        expected = streamed.logits(streamed.final_norm(hidden))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    generated = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 44)


@matrix
def test_same_seed_same_bytes_interrupted_or_not_wherever_activations_live(
    case: Case, runs: Any, text: Path, tmp_path: Path
) -> None:
    """Once in one piece, activations in memory; once in two, activations on disk."""
    source, result = runs(case)
    machine = Machine(activation_bytes=0)

    class Stop(Silent):
        blocks = 0
        phase = ""

        def begin(self, phase: str, total: int, unit: str) -> None:
            self.phase = phase

        def advance(self, steps: int = 1, detail: str = "") -> None:
            self.blocks += steps * (self.phase == "compress")
            if self.blocks == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe_for(source, case.steps, text), tmp_path / "cut", progress=Stop(), machine=machine)
    assert not (tmp_path / "cut" / "config.json").exists()
    resumed = run(recipe_for(source, case.steps, text), tmp_path / "cut", machine=machine)
    assert resumed.report["replayed_blocks"] == 2
    assert fingerprints(tmp_path / "cut") == fingerprints(result.folder)
    figures = {layer["name"]: layer["figures"] for layer in resumed.report["layers"]}
    assert figures == {layer["name"]: layer["figures"] for layer in result.report["layers"]}


@matrix
def test_evaluation_is_close_to_the_original(case: Case, runs: Any) -> None:
    _, result = runs(case)
    fidelity = result.report["evaluation"]["fidelity"]
    assert 0 <= fidelity["kl_mean"] < case.kl
    assert fidelity["kl_mean"] <= fidelity["kl_max"]
    assert 0 < fidelity["top1_agreement"] <= 1


@matrix
def test_result_can_be_compressed_again(case: Case, runs: Any, text: Path, tmp_path: Path) -> None:
    _, result = runs(case)
    again = run(recipe_for(result.folder, [{"rtn": {"bits": 8, "group_size": -1}}], text), tmp_path / "again")
    fidelity = again.report["evaluation"]["fidelity"]  # to the compressed model that it was made from
    assert fidelity["kl_mean"] < 0.05
    assert again.plan.layers.keys() >= {n for n in result.plan.layers if n != "lm_head"}


@pytest.mark.parametrize("case", [c for c in CASES if c.finer], ids=str)
def test_finer_settings_lose_less(case: Case, runs: Any, text: Path, tmp_path: Path) -> None:
    source, result = runs(case)
    finer = run(recipe_for(source, case.finer, text), tmp_path / "finer")
    assert finer.plan.bytes_total_after > result.plan.bytes_total_after
    assert finer.report["evaluation"]["fidelity"]["kl_mean"] < result.report["evaluation"]["fidelity"]["kl_mean"]
