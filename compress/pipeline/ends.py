"""What lies before the blocks and behind them: the token table and the head, which may themselves be compressed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.calibration.statistics import gather
from compress.calibration.store import HiddenStates
from compress.checkpoint.headers import read_header
from compress.checkpoint.reader import CheckpointReader
from compress.checkpoint.writer import finite_chunks
from compress.methods.base import Outcome
from compress.models.architecture import Site
from compress.pipeline.journal import BlockEntry
from compress.pipeline.shards import ENTRY
from compress.pipeline.targets import merged

if TYPE_CHECKING:
    from compress.pipeline.stage import Stage


def write_entry(stage: Stage, finished: BlockEntry | None) -> None:
    """Everything before block 0, the token table above all, which may itself be compressed."""
    architecture = stage.plan.architecture
    table = architecture.embedding.linears[0]
    if finished is None:
        _check_head(stage)
        inside = tuple(f"{prefix}." for prefix in architecture.blocks)
        head = architecture.head.linears[0] + "."
        names = [n for n in stage.model.reader.infos if not n.startswith(inside) and not n.startswith(head)]
        outcomes = _compressed(stage, architecture.embedding, None)
        finished = stage.shards.write(ENTRY, names, outcomes)
        stage.journal.add(finished)
    stage.result.layers.update(finished.layers)
    if table in stage.plan.layers:  # a table is never plain: no method makes one so
        with CheckpointReader(stage.out, read_header(stage.out / finished.file)) as reader:
            stage.model.replace_table(stage.layers.read(table, reader))
    elif stage.plan.rewrites:  # rows of a rewritten table would be made again for every batch
        stage.model.table_reader = CheckpointReader(stage.out, read_header(stage.out / finished.file))


def _check_head(stage: Stage) -> None:
    """A head that cannot be used ends the run now and not behind the last block."""
    for name in stage.model.reader.infos:
        if name.startswith(stage.plan.architecture.head.linears[0] + "."):
            for _ in finite_chunks(stage.model.reader, name):
                pass


def write_head(stage: Stage, finished: BlockEntry | None, hidden: HiddenStates) -> None:
    """The head: compressed if asked for, on the final normed hidden states; else copied."""
    architecture = stage.plan.architecture
    head = architecture.head.linears[0]
    if finished is None:
        outcomes = _compressed(stage, architecture.head, hidden)
        names = [n for n in stage.model.reader.infos if n.startswith(head + ".")]
        extra = {}
        if stage.plan.untied and head not in outcomes:
            extra[f"{head}.weight"] = stage.shards.dense_table()
        finished = stage.shards.write(architecture.n_blocks, names, outcomes, extra)
        stage.journal.add(finished)
    stage.result.layers.update(finished.layers)


def _compressed(stage: Stage, site: Site, hidden: HiddenStates | None) -> dict[str, Outcome]:
    """The token table (no inputs) or the head (inputs: the final normed hidden states)."""
    name = site.linears[0]
    outcomes: dict[str, Outcome] = {}
    for step in stage.steps:
        if name not in step.configs:
            continue
        width = stage.plan.layers[name].in_features
        statistics = None
        requests = step.method.statistics(step.configs[name])
        if hidden is not None and requests:
            n_tokens = sum(ids.numel() for ids in stage.batches)
            gatherer = gather(requests, width, n_tokens, stage.generator(step, site.name, "statistics"))
            for x in stage.normed(hidden):
                gatherer.add(x)
            statistics = gatherer.result(f"{name} ({step.method.name})")
        target = stage.layers.outer_target(site, outcomes.get(name))
        done = stage.compress_targets(site, step, [target], statistics)
        outcomes |= {name: merged(outcomes.get(name), outcome) for name, outcome in done.items()}
    return outcomes
