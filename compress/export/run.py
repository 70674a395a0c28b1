"""`compress.export`: check, convert layer by layer, read back, and only then put the result in its place."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import torch

from compress.checkpoint.budget import Budget, parse_budget
from compress.checkpoint.description import modules_of
from compress.checkpoint.headers import read_json
from compress.checkpoint.reader import TORCH_DTYPES
from compress.checkpoint.seal import SEAL, SEALED_FILES, VERSION, file_sha256
from compress.checkpoint.side_files import copy_file, side_files
from compress.checkpoint.source import find_source
from compress.checkpoint.translate import open_reader
from compress.checkpoint.writer import write_json, write_text
from compress.errors import CheckpointError, RecipeError, naming
from compress.export.folder import CONFIG, check_out, install, staging
from compress.export.formats import Format, Model, check_held, find_format
from compress.export.read_back import ReadBack, read_back
from compress.export.readme import readme
from compress.export.servers import named, server_warnings
from compress.export.shards import Part, parts_of, write_shards
from compress.models.families import architecture_of
from compress.pipeline.progress import Progress, Silent

LARGEST_SCALE_CHANGE = 2.0**-8  # relative: what rounding to bfloat16 costs; more is not the same model any more
KEPT = ("recipe.yaml",)  # of a run, beside the side files


def export(
    folder: str | Path,
    format: str,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
    memory_budget: Budget | str | int | None = None,
) -> dict[str, Any]:
    """See `compress.export`."""
    progress = progress or Silent()
    format_ = find_format(format)
    budget = None if memory_budget is None else parse_budget(memory_budget)
    model = open_model(str(folder), revision, budget)
    try:
        target = Path(out).expanduser() if out is not None else default_out(model, format)
        check_out(target, model.folder, overwrite)
        with naming(folder):
            check_held(format_, model)
        changes = _scale_changes(model, format_)
        warnings = [*_inexact(changes, format_), *server_warnings(format, model)]
        with staging(target) as stage:
            found = _write(model, format_, stage, progress)
            install(stage, target)
    finally:
        model.reader.close()
    return _report(model, format, target, warnings, max(changes.values(), default=0.0), found)


def open_model(name: str, revision: str | None = None, budget: Budget | None = None) -> Model:
    """A compressed checkpoint to be exported; of a stack, what fits `budget`.

    Raises: RecipeError if nothing in it is compressed.
    """
    source = find_source(name, revision, budget)
    folder = source.fetch(budget=budget)
    config = read_json(folder / CONFIG)
    reader = open_reader(folder, config, budget)
    with naming(name):
        specs = modules_of(config, reader.infos)
        structure = architecture_of(config, reader.infos.keys()).structure
        if not structure.plain:
            raise RecipeError(
                f"no format holds it, dense files neither: {structure.reason}; it runs as it is, with compress.load, or with "
                f"transformers after `import compress`"
            )
        if not specs:
            raise RecipeError(
                "nothing in it is compressed, so there is nothing to export; compress it first: compress run"
            )
        architecture = architecture_of(config, reader.infos.keys())
        known = {linear for site in architecture.all_sites() for linear in site.linears}
        unknown = next((module for module in specs if module not in known), None)
        if unknown is not None:
            raise CheckpointError(f"{unknown}: is compressed, and the family {architecture.family!r} has no such layer")
    return Model(name, folder, config, architecture, specs, reader)


def default_out(model: Model, format_: str) -> Path:
    """Beside the source, or in out/ if that is not a folder of the user's."""
    path = Path(model.name).expanduser()
    base = (path if path.name else path.resolve()) if path.is_dir() else Path("out") / model.name.rpartition("/")[2]
    return base.with_name(f"{base.name}-{format_}")


def _scale_changes(model: Model, format_: Format) -> dict[str, float]:
    """By layer, the largest relative change of a scale where the format stores another dtype than the source.

    Raises: RecipeError naming the layer whose scales the format cannot hold well enough.
    """
    changes = {}
    for name in model.specs:
        dtype = format_.scale_dtype(model, name)
        scale_name = f"{name}.weight_scale"
        if dtype is None or dtype == model.float_dtype(name) or scale_name not in model.reader:
            continue
        scale = model.reader.read(scale_name)
        cast = scale.to(TORCH_DTYPES[dtype])
        change = ((cast.double() - scale.double()).abs() / scale.double().abs().clamp(min=1e-300)).max().item()
        if not torch.isfinite(cast).all() or change > LARGEST_SCALE_CHANGE:
            low, high = scale.abs().min().item(), scale.abs().max().item()
            raise RecipeError(
                f"{model.name}: {name}: its scales ({low:.3g} to {high:.3g}) do not fit into {_dtype_name(dtype)}, in which "
                f"{format_.name} stores them (they would change by {change:.2g}); export to compressed-tensors instead"
            )
        if change:
            changes[name] = change
    return changes


def _inexact(changes: dict[str, float], format_: Format) -> list[str]:
    if not changes:
        return []
    largest = max(changes.values())
    return [
        f"scales are rounded to the dtype in which {format_.name} stores them: the largest changes by {largest:.2g} of itself, "
        f"in {named(changes)}"
    ]


def _dtype_name(dtype: str) -> str:
    return str(TORCH_DTYPES[dtype]).removeprefix("torch.")


def _write(model: Model, format_: Format, stage: Path, progress: Progress) -> ReadBack:
    """Everything that makes the export, in `stage`, and read back."""
    parts = parts_of(model, format_, lambda name: progress.advance(1, name))
    _check_space(stage, parts)
    config = _config(model, format_)
    progress.begin("export", len(model.specs), "layer")
    sums = write_shards(stage, parts)
    progress.end()
    found = read_back(model, format_, stage, config, sums, progress)
    for name in [*side_files(model.folder), *(n for n in KEPT if (model.folder / n).is_file())]:
        copy_file(model.folder / name, stage / name)
    for name, content in format_.files(model).items():
        write_json(stage / name, content)
    write_text(stage / "README.md", readme(model, format_))
    write_json(stage / CONFIG, config)
    files = {path.relative_to(stage).as_posix(): path for path in sorted(stage.rglob("*")) if path.is_file()}
    seal = {
        "format_version": VERSION,
        "made_by": f"compress-llm {_version()}",
        "format": format_.name,
        "source": model.name,
        "files": {name: path.stat().st_size for name, path in files.items()},
        "sealed_files": {name: file_sha256(path) for name, path in files.items() if name in SEALED_FILES},
        "tensors": sums,
    }
    write_json(stage / SEAL, seal)
    return found


def _config(model: Model, format_: Format) -> dict[str, Any]:
    config = {k: v for k, v in model.config.items() if k not in ("compression_config", "transformers_weights")}
    quantization = format_.quantization_config(model)
    config.pop("quantization_config", None)
    return config if quantization is None else {**config, "quantization_config": quantization}


def _check_space(folder: Path, parts: list[Part]) -> None:
    needed = sum(part.nbytes for part in parts)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{folder.parents[1]}: the export takes {needed:,} bytes, and {free:,} are free there; choose another --out"
        )


def _report(
    model: Model, format_: str, out: Path, warnings: list[str], scale_change: float, found: ReadBack
) -> dict[str, Any]:
    files = {path.relative_to(out).as_posix(): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}
    before = sum(path.stat().st_size for path in model.folder.glob("*.safetensors"))
    return {
        "source": model.name,
        "format": format_,
        "folder": str(out),
        "layers": len(model.specs),
        "bytes_weights_source": before,
        "bytes_weights": sum(size for name, size in files.items() if name.endswith(".safetensors")),
        "files": files,
        "largest_scale_change": scale_change,
        "read_back": found.to_dict(),
        "warnings": warnings,
        "next": shlex.join(["compress", "eval", str(out)]),
    }


def _version() -> str:
    from compress import __version__

    return __version__
