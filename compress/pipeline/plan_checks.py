"""What a plan refuses: a source that is not whole, data that is not at hand. Headers and settings only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.checkpoint.source import Source, tokenizer_size
from compress.errors import CheckpointError, RecipeError
from compress.models.architecture import Architecture
from compress.modules.spec import ModuleSpec

if TYPE_CHECKING:
    from compress.recipe import Recipe


def check_source(source: Source, architecture: Architecture, specs: dict[str, ModuleSpec]) -> None:
    """Every tensor that the architecture names is there, in the shape that config.json implies.

    Raises: CheckpointError naming the first one that is not.
    """
    for site in architecture.all_sites():
        for name in site.linears:
            if name in specs:
                for suffix, (_, shape) in specs[name].tensors("F32").items():
                    _check_tensor(source, f"{name}.{suffix}", shape)
            elif not (site.kind == "head" and architecture.tied):
                _check_tensor(source, f"{name}.weight", None)

    table = f"{architecture.embedding.linears[0]}.weight"
    if table in source.infos and source.infos[table].shape[:1] != (architecture.vocab_size,):
        raise CheckpointError(
            f"{source.folder or source.name}: tensor {table} has shape {source.infos[table].shape}, config.json has "
            f"vocab_size={architecture.vocab_size}; the weights do not belong to this config.json: fetch both again"
        )


def _check_tensor(source: Source, name: str, shape: tuple[int, ...] | None) -> None:
    info = source.infos.get(name)
    where = source.folder or source.name
    if info is None:
        raise CheckpointError(
            f"{where}: tensor {name} is missing; the weights do not belong to this config.json: fetch both again"
        )
    if shape is not None and info.shape != shape:
        raise CheckpointError(
            f"{where}: tensor {name} has shape {info.shape}, config.json describes {shape}; fetch both again"
        )


def check_data_at_hand(recipe: Recipe, source: Source, architecture: Architecture, needs_data: bool) -> None:
    """Tokenizer and data are at hand where a step (`needs_data`) or the evaluation needs them."""
    from compress.calibration.data import check_data

    if (needs_data or recipe.evaluation) and not source.has_tokenizer:
        raise CheckpointError(
            f"{source.name}: no tokenizer (tokenizer.json or tokenizer.model) beside the weights, which calibration and "
            f"evaluation need; copy the tokenizer's files into the folder"
        )
    size = tokenizer_size(source)
    if (needs_data or recipe.evaluation) and size is not None and size > architecture.vocab_size:
        raise CheckpointError(
            f"{source.name}: the tokenizer has ids up to {size - 1}, the model only {architecture.vocab_size} rows of "
            f"embeddings: it is another model's tokenizer; put the right one beside the weights"
        )
    if needs_data:
        _check_length("calibration.length", recipe.calibration.length, architecture)
        check_data(recipe.calibration, "calibration")
    if recipe.evaluation:
        if recipe.evaluation.length is not None:
            _check_length("evaluation.length", recipe.evaluation.length, architecture)
        check_data(recipe.evaluation, "evaluation")


def _check_length(field_name: str, length: int, architecture: Architecture) -> None:
    if architecture.max_positions is not None and length > architecture.max_positions:
        raise RecipeError(
            f"{field_name}: {length} tokens, but the model has {architecture.max_positions} positions; "
            f"use --set {field_name}={architecture.max_positions}"
        )
