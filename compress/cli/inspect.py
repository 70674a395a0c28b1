"""`compress inspect`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli.options import Debug, Json, Layers, MemoryBudget, ModelFolder, Quiet, Revision, refuse_unfinished

if TYPE_CHECKING:
    from collections.abc import Callable

    from compress.checkpoint.headers import TensorInfo
    from compress.checkpoint.source import Source
    from compress.models.architecture import Architecture
    from compress.modules.spec import ModuleSpec

Check = Annotated[bool, typer.Option("--check", help="read every tensor: checksums of an export, NaN and infinity")]


@dataclass(frozen=True)
class Module:
    """A module that owns tensors, as it is stored. `method` is None where nothing was replaced."""

    block: int | None
    method: str | None
    representation: str
    shape: tuple[int, ...]
    bits_per_weight: float
    nbytes: int


def inspect(
    model: ModelFolder,
    revision: Revision = None,
    memory_budget: MemoryBudget = None,
    layers: Layers = False,
    check: Check = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what a checkpoint consists of: method, representation and bytes of each layer, from the headers alone.

    \b
    Example:  compress inspect out/demo
    """
    from compress.cli.show import note, print_json
    from compress.errors import CheckpointError

    refuse_unfinished(model)
    from compress.checkpoint.budget import parse_budget
    from compress.checkpoint.seal import read_seal
    from compress.checkpoint.source import find_source

    budget = None if memory_budget is None else parse_budget(memory_budget, "--memory-budget")
    source = find_source(model, revision, budget)
    if source.folder is not None:
        read_seal(source.folder)
    notes: list[str] = []
    architecture, specs = _understood(source, notes)
    modules = modules_in(source, architecture, specs, methods_of(source, specs))
    bad = bad_tensors(source, quiet) if check else None
    stack = stack_facts(source, specs, check)
    if as_json:
        print_json({**to_dict(source, architecture, specs, modules, bad), "stack": stack})
    else:
        _print(source, architecture, specs, modules, layers, stack)
    if stack is not None and stack["loss"] is not None:
        notes.append(stack["loss"])
    if not quiet:
        for message in notes:
            note(f"note: {message}")
    if bad:
        raise CheckpointError(
            f"{model}: tensor {bad[0]} holds NaN or infinity, as do {len(bad) - 1} others; fetch or make the model again"
        )
    if bad is not None and not quiet:
        note(f"checked: {len(source.infos)} tensors, no NaN, no infinity")


def _understood(source: Source, notes: list[str]) -> tuple[Architecture | None, dict[str, ModuleSpec]]:
    """Architecture and compressed modules as far as they are known to us; `notes` says what is not."""
    from compress.checkpoint.description import modules_of
    from compress.errors import CompressError
    from compress.models.families import architecture_of

    architecture, specs = None, {}
    try:
        architecture = architecture_of(source.config, source.infos.keys())
    except CompressError as error:
        notes.append(str(error))
    try:
        specs = modules_of(source.config, source.infos)
    except CompressError as error:
        notes.append(str(error))
    return architecture, specs


def stack_facts(source: Source, specs: dict[str, ModuleSpec], check: bool) -> dict[str, Any] | None:
    """Of a stack in a folder: the sizes that it loads at, and what of it is looked at; `check`: held to its checksums."""
    from compress.checkpoint.headers import read_base_headers
    from compress.checkpoint.stack import stack_of

    if source.folder is None or not any(spec.n_levels > 1 or spec.scales_rows for spec in specs.values()):
        return None
    table = stack_of(source.folder, read_base_headers(source.folder))
    if table is None:
        return None
    if check:
        for _ in table.read(0, table.available):
            pass
    n = sum(spec.n_levels - 1 for name, spec in specs.items() if name in table.specs)
    return {
        "minimum": table.minimum, "maximum": table.maximum, "bytes": table.nbytes(n), "bits_per_weight": table.bits(n),
        "bits_per_weight_minimum": table.bits(0), "bits_per_weight_maximum": table.bits(len(table.entries)),
        "blocks": n, "blocks_available": table.available, "blocks_all": len(table.entries), "order": table.order,
        "files": [{"name": file.name, "bytes": file.nbytes} for file in table.files], "loss": table.loss,
    }  # fmt: skip


def methods_of(source: Source, specs: dict[str, ModuleSpec]) -> dict[str, str]:
    """Layer -> method, by the report of the run that made the folder, else by the recipe beside the weights."""
    from compress.errors import CompressError

    if source.folder is None or not specs:
        return {}
    try:
        report = json.loads((source.folder / "compress_report.json").read_text(encoding="utf-8"))
        return {str(layer["name"]): str(layer["method"]) for layer in report["layers"]}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if not (source.folder / "recipe.yaml").is_file():
        return {}
    from compress.patterns import select
    from compress.recipe import Recipe

    found: dict[str, str] = {}
    try:
        for step in Recipe.load(source.folder / "recipe.yaml").steps:
            chosen = select(list(specs), step.layers, step.skip, where="recipe.yaml")
            found.update(dict.fromkeys(chosen, step.method))
    except CompressError:
        pass  # a recipe of another version, or edited: the table goes without
    return found


def modules_in(
    source: Source, architecture: Architecture | None, specs: dict[str, ModuleSpec], methods: dict[str, str]
) -> dict[str, Module]:
    """Every module that owns tensors, by its name on disk, in the order of the model."""
    from compress.checkpoint.names import owner

    owned: dict[str, list[TensorInfo]] = {}
    for name, info in source.infos.items():
        owned.setdefault(owner(name, specs) or name.rpartition(".")[0] or name, []).append(info)
    prefixes = {prefix: i for i, prefix in enumerate(architecture.blocks)} if architecture else {}
    modules: dict[str, Module] = {}
    for name, infos in owned.items():
        parts = name.split(".")
        heads = (".".join(parts[:n]) for n in range(1, len(parts) + 1))
        block = next((prefixes[head] for head in heads if head in prefixes), None)
        spec = specs.get(name)
        stored = [info for info in infos if not info.name.endswith(".bias")] or infos
        if spec is not None:
            from compress.cli.layers import describe

            representation = describe(spec)
            shape: tuple[int, ...] = (spec.out_features, spec.in_features)
        else:
            representation, shape = ", ".join(sorted({info.dtype for info in stored})), stored[0].shape
        n_weights = prod(shape) if spec or len(stored) == 1 else sum(prod(info.shape) for info in stored)
        bits = 8 * sum(info.nbytes for info in stored) / max(n_weights, 1)
        nbytes = sum(info.nbytes for info in infos)
        method = methods.get(name, "not recorded") if spec else None
        modules[name] = Module(block, method, representation, shape, bits, nbytes)
    return {name: modules[name] for name in sorted(modules, key=_order(architecture, modules))}


def _order(architecture: Architecture | None, modules: dict[str, Module]) -> Callable[[str], tuple[int, int]]:
    """The order in which data pass through modules: token table, blocks with their linears, the rest."""
    sites = architecture.all_sites() if architecture else ()
    rank = {linear: i for i, linear in enumerate(name for site in sites for name in site.linears)}

    def place(name: str) -> tuple[int, int]:
        block = modules[name].block
        if block is not None:
            return block, rank.get(name, -1)
        return (-1, 0) if rank.get(name) == 0 else (len(modules), rank.get(name, -1))

    return place


def bad_tensors(source: Source, quiet: bool) -> list[str]:
    """Tensors that hold a value which is no finite number; reads all of the weights."""
    import torch

    from compress.checkpoint.translate import open_reader
    from compress.cli.progress import Display

    bad = []
    with Display(quiet) as display, open_reader(source.fetch(), source.config) as reader:
        display.begin("check", len(reader.infos), "tensor")
        for name in reader.infos:
            tensor = reader.read(name)
            if tensor.is_floating_point():
                tensor = tensor.float() if tensor.element_size() == 1 else tensor  # no arithmetic in 8 bits
                if not torch.isfinite(tensor).all():
                    bad.append(name)
            display.advance(1)
        display.end()
    return bad


def to_dict(
    source: Source,
    architecture: Architecture | None,
    specs: dict[str, ModuleSpec],
    modules: dict[str, Module],
    bad: list[str] | None,
) -> dict[str, Any]:
    """Everything, for JSON."""
    rows = [{"name": name, **asdict(module)} for name, module in modules.items()]
    blocks = block_bytes(modules)
    content = {
        "model": source.name,
        "folder": str(source.folder) if source.folder else None,
        "family": architecture.family if architecture else None,
        "n_blocks": architecture.n_blocks if architecture else None,
        "tied": architecture.tied if architecture else None,
        "format": stored_format(source),
        "layers": rows,
        "blocks": [{"block": block, "bytes": nbytes} for block, nbytes in blocks.items()],
        "bytes_replaced": sum(modules[name].nbytes for name in specs),
        "bits_per_weight_replaced": replaced_bits(specs, modules),
        "bytes_total": sum(module.nbytes for module in modules.values()),
        "bytes_on_disk_all": files_bytes(source),
    }
    return content if bad is None else {**content, "check": {"tensors": len(source.infos), "not_finite": bad}}


def stored_format(source: Source) -> str:
    quantization = source.config.get("quantization_config") or source.config.get("compression_config") or {}
    return str(quantization.get("quant_method", "plain")) if isinstance(quantization, dict) else "plain"


def block_bytes(modules: dict[str, Module]) -> dict[int, int]:
    totals: dict[int, int] = {}
    for module in modules.values():
        if module.block is not None:
            totals[module.block] = totals.get(module.block, 0) + module.nbytes
    return totals


def replaced_bits(specs: dict[str, ModuleSpec], modules: dict[str, Module]) -> float | None:
    n_weights = sum(prod(modules[name].shape) for name in specs)
    bits = sum(modules[name].bits_per_weight * prod(modules[name].shape) for name in specs)
    return bits / n_weights if n_weights else None


def files_bytes(source: Source) -> int | None:
    if source.folder is None:
        return None
    return sum(file.stat().st_size for file in Path(source.folder).iterdir() if file.is_file())


def _print(
    source: Source,
    architecture: Architecture | None,
    specs: dict[str, ModuleSpec],
    modules: dict[str, Module],
    one_each: bool,
    stack: dict[str, Any] | None = None,
) -> None:
    from compress.cli.layers import alike
    from compress.cli.show import human_bytes, out, pairs, show, table

    kinds = {name: (m.method, m.representation, m.shape, m.bits_per_weight, m.nbytes) for name, m in modules.items()}
    rows = []
    for name, (method, representation, shape, bits, nbytes), count in alike(kinds, one_each):
        size = human_bytes(nbytes * count)
        shown = " x ".join(map(str, shape))
        rows.append((name, str(count), method or "–", representation, shown, f"{bits:.3f}", size))
    show(table(("layers", ">n", "method", "representation", ">shape", ">bits per weight", ">bytes"), rows))
    out("")
    total = sum(m.nbytes for m in modules.values())
    blocks = block_bytes(modules)
    facts = [
        (
            "model",
            f"{source.name}: {architecture.family}, {architecture.n_blocks} blocks" if architecture else source.name,
        )
    ]
    facts.append(("format", stored_format(source)))
    for nbytes, run in groupby(blocks.items(), key=lambda item: item[1]):
        numbers = [block for block, _ in run]
        span = f"block {numbers[0]}" if len(numbers) == 1 else f"blocks {numbers[0]}-{numbers[-1]}"
        facts.append((span, f"{human_bytes(nbytes)}{'' if len(numbers) == 1 else ' each'}"))
    if blocks:
        facts.append(("outside the blocks", human_bytes(total - sum(blocks.values()))))
    mean_bits = replaced_bits(specs, modules)
    if mean_bits is not None:
        replaced = human_bytes(sum(modules[name].nbytes for name in specs))
        facts.append((f"{len(specs)} compressed layers", f"{replaced}, {mean_bits:.3f} bits per weight"))
    facts.append(("all tensors", human_bytes(total)))
    if stack is not None:
        sizes = (
            (stack["minimum"], stack["bits_per_weight_minimum"]),
            (stack["maximum"], stack["bits_per_weight_maximum"]),
        )
        smallest, largest = (f"{human_bytes(nbytes)} ({bits:.3f} bits per weight)" for nbytes, bits in sizes)
        facts.append(
            (
                "stack",
                f"{stack['blocks']} of {stack['blocks_all']} blocks, {stack['bits_per_weight']:.3f} bits per weight",
            )
        )
        facts.append(("", f"loads at any size from {smallest} to {largest}"))
    on_disk = files_bytes(source)
    if on_disk is not None:
        facts.append(("all files", f"{human_bytes(on_disk)} on disk"))
    show(pairs(facts))
