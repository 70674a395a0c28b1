"""Steps that rewrite the whole model, in the plan: what the model looks like behind each.

The steps that compress layers come after, and see the rewritten model as their source: `config.json` and tensors as they
would stand on disk. No file of it is ever written; `open_rewritten` reads it from the original.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.description import FLOATS, modules_of, own_config
from compress.checkpoint.foreign import translated
from compress.checkpoint.headers import TensorInfo
from compress.checkpoint.source import Source
from compress.errors import CheckpointError, RecipeError, naming
from compress.models.architecture import Architecture
from compress.models.derived import Derived
from compress.models.families import architecture_of, changed_config
from compress.models.stream import Stream, stream_of
from compress.modules.spec import DTYPE_BYTES, ModuleSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from compress.checkpoint.reader import CheckpointReader
    from compress.checkpoint.stream import StreamedModel
    from compress.methods.base import MethodConfig
    from compress.methods.rewrite import Found, ModelMethod, ModelShape, Rewrite
    from compress.pipeline.plan import Plan
    from compress.recipe import Recipe, Step

MARKS = "compress_rewritten"  # the key of config.json under which rewrites are remembered


@dataclass(frozen=True)
class RewritePlan:
    """One step that rewrites the model.

    Attributes:
        before, after: the model as the step finds it and as it leaves it.
        tensors: those of the result: functions of tensors of `before`, or names of tensors there.
        values: what was found by looking at the model; None if it has not been looked at (yet).
        kept_bytes: of what looking leaves on disk until the run is finished.
    """

    number: int
    method: type[ModelMethod]
    config: MethodConfig
    before: Source
    after: Source
    tensors: Mapping[str, Derived | str]
    rewrite: Rewrite
    values: Mapping[str, Any] | None
    kept_bytes: int

    @property
    def observes(self) -> bool:
        return self.method.observes(self.config)

    @property
    def settled(self) -> bool:
        return self.values is not None or not self.observes

    @property
    def needs_data(self) -> bool:
        return self.method.needs_tokens(self.config)


Kept = Callable[[int, str], "Tensor"]  # (step, name) -> a tensor that its observation kept


def rewriting_steps(recipe: Recipe) -> int:
    """How many steps at the head of the recipe rewrite the model.

    Raises: RecipeError if one of them stands behind a step that compresses layers, or names layers.
    """
    from compress.methods import find
    from compress.methods.rewrite import ModelMethod

    rewrites = [issubclass(find(step.method), ModelMethod) for step in recipe.steps]
    count = rewrites.index(False) if False in rewrites else len(rewrites)
    for number, step in enumerate(recipe.steps):
        if rewrites[number] and number > count:
            raise RecipeError(
                f"steps.{number}: {step.method} rewrites the whole model and must stand before {recipe.steps[count].method}, "
                f"which compresses layers; put it first"
            )
        if rewrites[number]:
            _check_whole(number, step)
    return count


def _check_whole(number: int, step: Step) -> None:
    for key, value in (("layers", step.layers), ("skip", step.skip), ("overrides", step.overrides)):
        if value:
            raise RecipeError(
                f"steps.{number}.{key}: {step.method} rewrites the whole model, not single layers; leave {key} out"
            )


def plan_rewrites(
    recipe: Recipe,
    source: Source,
    float_dtype: str,
    values: Mapping[int, Mapping[str, Any]] | None = None,
    kept: Kept | None = None,
) -> tuple[RewritePlan, ...]:
    """The leading steps of the recipe that rewrite the model, each on what the one before leaves.

    Args:
        float_dtype: safetensors name of the dtype in which float tensors will be stored.
        values: what was found, by step; steps behind the first that must look and has not are planned by their sizes.
        kept: gives the tensors that belong to it.

    Raises: RecipeError for what a method or a family does not admit.
    """
    from compress.methods import find
    from compress.methods.rewrite import Found

    planned: list[RewritePlan] = []
    for number in range(rewriting_steps(recipe)):
        step, method = recipe.steps[number], find(recipe.steps[number].method)
        found = (values or {}).get(number)

        def tensor(name: str, number: int = number) -> Tensor:
            assert kept is not None, f"{name} is wanted before it was found"
            return kept(number, name)

        def generator(purpose: str, number: int = number) -> torch.Generator:
            return seeded(recipe.seed, "rewrite", number, purpose)

        known = Found(found, tensor, generator)
        planned.append(_planned(number, method, step.config, source, float_dtype, known))  # type: ignore[arg-type]
        source = planned[-1].after
    return tuple(planned)


def _planned(
    number: int, method: type[ModelMethod], config: MethodConfig, source: Source, float_dtype: str, found: Found
) -> RewritePlan:
    infos = translated(source.config, source.infos)
    architecture = architecture_of(source.config, infos.keys())
    where, specs = f"steps.{number}.{method.name}", modules_of(source.config, infos)
    if specs and not method.on_compressed:
        raise RecipeError(
            f"{where}: {source.name} is compressed already, and {method.name} rewrites ordinary weights; begin with the original"
        )
    marks = marks_of(source.config)
    shape = model_shape(architecture, infos, float_dtype, specs, marks)
    with naming(where):
        rewrite = method.rewrite(shape, config, found)
        kept_bytes = method.kept_bytes(shape, config)
        if rewrite.blocks is not None and architecture.structure.width is not None:
            raise RecipeError(
                "the blocks of a model with a narrower stream have a basis each, which leads from one to the next; put "
                f"{method.name} before the step that makes the stream narrower"
            )
        changed = changed_config(source.config, architecture, blocks=rewrite.blocks, untied=rewrite.untied)
    anew = _numbered_anew(architecture, rewrite)
    infos, tensors = _tensors_after(infos, anew, rewrite, float_dtype)
    with naming(where):
        moved = {new: _lent_anew(name, spec, anew) for name, spec in specs.items() if (new := anew(name)) is not None}
    structure = architecture.structure if rewrite.structure.plain else rewrite.structure
    if rewrite.mark:
        marks = {**marks, method.name: tuple(sorted({*marks.get(method.name, ()), *rewrite.mark}))}
        changed[MARKS] = {name: list(of_method) for name, of_method in marks.items()}
    if specs or not structure.plain:
        changed["quantization_config"] = own_config(moved, structure)
    after = replace(source, config=changed, infos=infos)
    return RewritePlan(number, method, config, source, after, tensors, rewrite, found.values, kept_bytes)


def marks_of(config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """What config.json remembers of rewrites, by the name of their method. Raises: CheckpointError if it is not of that form."""
    written = config.get(MARKS, {})
    if not isinstance(written, Mapping) or not all(
        isinstance(marks, list) and all(isinstance(mark, str) for mark in marks) for marks in written.values()
    ):
        raise CheckpointError(f"config.json: {MARKS}={written!r:.100} is not lists of words by method; fetch it again")
    return {name: tuple(marks) for name, marks in written.items()}


def _lent_anew(name: str, spec: ModuleSpec, anew: Callable[[str], str | None]) -> ModuleSpec:
    """`spec` with the name that its lender gets. Raises: RecipeError if that is left out."""
    lender = spec.lender()
    if lender is None:
        return spec
    new = anew(lender)
    if new is None:
        raise RecipeError(
            f"{lender} would be left out, and {name} uses the dictionary that it stores; protect its block, or begin with the "
            f"original"
        )
    return spec.lent_by(new)


def model_shape(
    architecture: Architecture,
    infos: Mapping[str, TensorInfo],
    float_dtype: str,
    specs: Collection[str] = (),
    marks: Mapping[str, tuple[str, ...]] | None = None,
) -> ModelShape:
    """A model as a method is told of it. `float_dtype`: of the result; `specs`: its modules that are compressed."""
    from compress.methods.rewrite import ModelShape

    def stream() -> Stream:
        return stream_of(architecture)

    linears = tuple(name for sites in architecture.block_sites for site in sites for name in site.linears)
    shapes = {name: info.shape for name, info in infos.items()}
    title = f"{architecture.table.title} ({architecture.model_type})"
    nbytes = {name: info.nbytes for name, info in infos.items()}
    outline = (title, shapes, architecture.blocks, linears, architecture.hidden_size, stream)
    return ModelShape(*outline, nbytes, DTYPE_BYTES[float_dtype], frozenset(specs), marks or {})


def _numbered_anew(architecture: Architecture, rewrite: Rewrite) -> Callable[[str], str | None]:
    """Name of a tensor or module in the model before -> its name in the result; None if its block has gone."""
    stay = range(architecture.n_blocks) if rewrite.blocks is None else rewrite.blocks
    places = {architecture.blocks[old]: architecture.blocks[new] for new, old in enumerate(stay)}
    blocks, depth = set(architecture.blocks), architecture.blocks[0].count(".") + 1

    def anew(name: str) -> str | None:
        parts = name.split(".")
        block = ".".join(parts[:depth])
        if block not in blocks:
            return name
        return ".".join([places[block], *parts[depth:]]) if block in places else None

    return anew


def _tensors_after(
    infos: Mapping[str, TensorInfo], anew: Callable[[str], str | None], rewrite: Rewrite, float_dtype: str
) -> tuple[dict[str, TensorInfo], dict[str, Derived | str]]:
    some = next(iter(infos.values()))
    found: dict[str, TensorInfo] = {}
    tensors: dict[str, Derived | str] = {}
    for name in [*infos, *(name for name in rewrite.tensors if name not in infos)]:
        new = anew(name)
        if name in rewrite.removed or new is None:
            continue
        made = rewrite.tensors.get(name)
        if made is None:
            tensors[new] = name
            found[new] = replace(infos[name], name=new)
        else:
            tensors[new] = made
            nbytes = prod(made.shape) * DTYPE_BYTES[float_dtype]
            found[new] = TensorInfo(new, float_dtype, made.shape, infos.get(name, some).file, 0, nbytes)
    return found, tensors


def seeded(seed: int, *place: object) -> torch.Generator:
    """Randomness that depends on the recipe's seed and the place only, so that a resumed run draws the same."""
    import torch

    text = "/".join(str(part) for part in (seed, *place))
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
    return torch.Generator().manual_seed(number)


def open_rewritten(folder: Path, rewrites: Sequence[RewritePlan]) -> CheckpointReader:
    """The tensors of the model behind `rewrites`, read from the original in `folder`."""
    from compress.checkpoint.rewritten import RewrittenReader
    from compress.checkpoint.translate import open_reader

    reader = open_reader(folder)
    for step in rewrites:
        prefixes = architecture_of(step.after.config, step.after.infos.keys()).blocks
        sizes = [
            sum(info.nbytes for name, info in step.after.infos.items() if name.startswith(f"{prefix}."))
            for prefix in prefixes
        ]
        reader = RewrittenReader(reader, step.after.infos, step.tensors, max(sizes, default=0))
    return reader


def recast(reader: CheckpointReader, float_dtype: str) -> CheckpointReader:
    """The same tensors, floats stored in another dtype. What that cannot hold is a NumericsError where it is read."""
    from compress.checkpoint.rewritten import RewrittenReader

    others = {name: info for name, info in reader.infos.items() if info.dtype in FLOATS and info.dtype != float_dtype}
    if not others:
        return reader
    tensors: dict[str, Derived | str] = {name: name for name in reader.infos}
    infos = dict(reader.infos)
    for name, info in others.items():
        tensors[name] = Derived(info.shape, (name,), _as_it_is, by_rows=len(info.shape) == 2)
        infos[name] = replace(info, dtype=float_dtype, offset=0, nbytes=prod(info.shape) * DTYPE_BYTES[float_dtype])
    return RewrittenReader(reader, infos, tensors, 0)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def open_source(
    plan: Plan,
    rewrites: Sequence[RewritePlan],
    folder: Path,
    work: Path,
    dtype: torch.dtype,
    device: torch.device,
) -> StreamedModel:
    """The model behind `rewrites`, to be run block by block, its floats rounded to the dtype in which the result stores them:
    what is kept runs in the pass as it will once it is written.

    Args:
        folder: of the original.
        work: where its config.json can be put.
    """
    from compress.checkpoint.stream import StreamedModel
    from compress.checkpoint.writer import write_json, writing

    trusted = plan.recipe.model.trust_remote_code
    reader = open_rewritten(folder, rewrites)
    if plan.recipe.model.dtype != "auto":
        reader = recast(reader, plan.float_dtype)
    if not rewrites:
        return StreamedModel(folder, dtype, device, reader=reader, trust_remote_code=trusted)
    described = work / f"rewritten-{rewrites[-1].number}"
    with writing(described):
        described.mkdir(parents=True, exist_ok=True)
    write_json(described / "config.json", rewrites[-1].after.config)
    return StreamedModel(described, dtype, device, reader=reader, trust_remote_code=trusted)


def whole_model(
    plan: Plan, rewrites: Sequence[RewritePlan], folder: Path, work: Path, device: torch.device
) -> torch.nn.Module:
    """The model behind `rewrites`, whole and in float32, experts unfused, no parameter of which requires a gradient."""
    import torch

    from compress.checkpoint.load import load
    from compress.models.experts import unfuse_experts

    if not rewrites:
        trusted = plan.recipe.model.trust_remote_code
        model = load(
            folder, dtype=torch.float32, device=str(device), trust_remote_code=trusted, kernels="reference"
        )  # fmt: skip
        original = plan.original
        unfuse_experts(model, architecture_of(original.config, original.infos.keys()))
        return model.requires_grad_(False)
    streamed = open_source(plan, rewrites, folder, work, torch.float32, device)
    try:
        return streamed.whole()
    finally:
        streamed.close()
