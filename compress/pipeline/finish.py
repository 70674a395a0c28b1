"""What makes a set of shards a checkpoint: index, tokenizer and other side files, recipe, card, and config.json last.

Until config.json is there no loader takes the folder for a model, so nothing unfinished looks whole.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint.description import guard, quantization_config
from compress.checkpoint.headers import read_header
from compress.checkpoint.reader import CheckpointReader
from compress.checkpoint.side_files import copy_file, side_files
from compress.checkpoint.stack import open_stack
from compress.checkpoint.stream import StreamedModel
from compress.checkpoint.writer import write_json, write_text
from compress.errors import CheckpointError
from compress.pipeline.plan import Plan
from compress.pipeline.plan_result import OWN, PLAIN
from compress.pipeline.shards import n_shards, shard_name
from compress.publish.base_model import card_of, carried
from compress.publish.card import model_card

DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def finished_config(plan: Plan) -> dict[str, Any]:
    """config.json of the result."""
    config = copy.deepcopy(plan.source.config)
    for key in ("quantization_config", "compression_config", "transformers_weights", "_name_or_path"):
        config.pop(key, None)
    config["dtype"] = DTYPE_NAMES[plan.float_dtype]
    config.pop("torch_dtype", None)
    if plan.untied:
        config["tie_word_embeddings"] = False
    if plan.format != PLAIN:
        config["quantization_config"] = quantization_config(plan.format, plan.specs, plan.architecture)
    if plan.format == OWN:
        config["transformers_weights"] = guard()
    return config


def check_logits(
    plan: Plan, config: dict[str, Any], out: Path, ids: Tensor, hidden: Tensor, stage_model: StreamedModel
) -> None:
    """Stream the probe through the finished files and compare with where the pass itself had arrived.

    Args:
        ids, hidden: the probe and its hidden states after the last block, from the pass.
        stage_model: the model of the pass, for its final norm and, where the head was not replaced, its head.

    Raises: CheckpointError if the finished model computes other logits.
    """
    work = out / ".compress"
    write_json(work / "config.json", config)
    infos = {}
    for number in range(n_shards(plan)):
        infos.update(read_header(out / shard_name(plan, number)))
    stack = open_stack(out, plan.specs)
    if stack is not None:
        infos |= stack.infos(stack.available)
    with CheckpointReader(out, infos) as reader:
        finished = StreamedModel(
            work, stage_model.dtype, stage_model.device, reader=reader, specs=plan.specs,
            trust_remote_code=plan.recipe.model.trust_remote_code,
        )  # fmt: skip
        found = finished.embed(ids)
        for index in range(finished.n_blocks):
            found = finished.call_block(finished.load_block(index), index, found)
            finished.unload_block(index)
        same_hidden = torch.equal(found.cpu(), hidden.cpu())
        logits = finished.logits(finished.final_norm(found))
        head = plan.architecture.head.linears[0]
        same_logits = bool(torch.isfinite(logits).all())
        if head not in plan.layers:
            expected = stage_model.logits(stage_model.final_norm(hidden.to(stage_model.device)))
            same_logits = same_logits and torch.equal(logits, expected)
    (work / "config.json").unlink()
    if not same_hidden or not same_logits:
        raise CheckpointError(
            f"{out}: the finished files compute other {'logits' if same_hidden else 'hidden states'} than the run did; the disk "
            f"or the memory is faulty: run again with another --out"
        )


def write_index(plan: Plan, out: Path) -> None:
    """The index over all shards."""
    weight_map: dict[str, str] = {}
    total = 0
    for number in range(n_shards(plan)):
        file = shard_name(plan, number)
        for name, info in read_header(out / file).items():
            weight_map[name] = file
            total += info.nbytes
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(out / index_name(plan), index)


def result_files(plan: Plan, source: Path) -> list[str]:
    """Every file of the finished folder, but the report and the stack's."""
    shards = [shard_name(plan, number) for number in range(n_shards(plan))]
    return sorted([*shards, index_name(plan), *side_files(source), "recipe.yaml", "README.md", "config.json"])


def index_name(plan: Plan) -> str:
    return f"{'compress' if plan.format == OWN else 'model'}.safetensors.index.json"


def finish(plan: Plan, source: Path, out: Path, config: dict[str, Any]) -> None:
    """Write everything beside the shards; config.json last."""
    write_index(plan, out)
    for name in side_files(source):
        copy_file(source / name, out / name)
    write_text(out / "recipe.yaml", plan.recipe.to_yaml())
    described = plan.to_dict()
    fields = carried(card_of(source), described["base"]["id"], set(result_files(plan, source)))
    write_text(out / "README.md", model_card(described, fields))
    write_json(out / "config.json", config)
