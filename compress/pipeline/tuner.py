"""The compressed model forth and back over the calibration rows, block by block, for a step that tunes it.

    teacher: all rows once, block by block; the hidden states behind the last block stay
    each iteration, for a few rows:
        forth: block after block; the hidden states between blocks stay
        the divergence of the logits and its gradient, a chunk of tokens at a time
        back:  block after block is loaded and run again from what entered it; its gradient goes to its parameters, which move

What is tuned are stored tensors, which a reader puts in place of the stored ones, rounded to their dtype. Values and the
optimizer's state lie in files, two of each part: those behind the last iteration and those in the making, so that an
interrupted run goes on behind the last whole one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from compress.calibration.store import Allowance, HiddenStates, embedded
from compress.checkpoint.headers import read_json
from compress.checkpoint.names import owner
from compress.checkpoint.reader import TORCH_DTYPES, CheckpointReader
from compress.checkpoint.stream import StreamedModel
from compress.checkpoint.writer import replace_file, write_json
from compress.errors import NumericsError, RecipeError
from compress.evaluation.chunks import LOGIT_BYTES, MIN_CHUNK_TOKENS
from compress.methods.block_learning import alike
from compress.methods.tuning import Parameter, Update
from compress.modules.base import CompressedModule
from compress.pipeline.meter import release_free_memory
from compress.pipeline.plan import Plan
from compress.pipeline.progress import Progress

DONE = "tuned.json"  # how many iterations are whole
STATE = "tuned-"  # of a part, behind an iteration of even or of odd number


class TunedReader(CheckpointReader):
    """Tensors of a checkpoint, some with other values. `values`: in the dtype in which they are stored."""

    def __init__(self, reader: CheckpointReader, values: Mapping[str, Tensor]):
        super().__init__(reader.folder, reader.infos, sealed=False)
        self.values = values

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        if name not in self.values:
            return super().read(name, dtype)
        value = self.values[name]
        return value.to(dtype) if dtype is not None else value


class Tuner:
    """The compressed model and its original, for a method that tunes: see `compress.methods.tuning.TuningTask`.

    Parts are the blocks by number, and behind them what lies outside of them.
    """

    def __init__(
        self,
        plan: Plan,
        student: StreamedModel,
        teacher: StreamedModel,
        batches: list[Tensor],
        scratch: Path,
        allowance: Allowance,
        progress: Progress,
    ):
        assert plan.tuning is not None
        self.plan, self.student, self.teacher = plan, student, teacher
        self.scratch, self.allowance, self.progress = scratch, allowance, progress
        self.rows = [row for ids in batches for row in ids]
        self.lengths = [len(row) for row in self.rows]
        self.at_once = plan.recipe.calibration.rows_per_batch
        self.wanted = plan.tuning.method.wanted(plan.tuning.config)
        self.done = int(read_json(scratch / DONE)["done"]) if (scratch / DONE).is_file() else 0
        self.kept = True  # whether the tuned values are the model's
        self.names = [self._names(part) for part in range(student.n_blocks + 1)]
        if not any(self.names):
            raise RecipeError(f"nothing of the result is {' or '.join(sorted(self.wanted))}, which could be tuned")
        self.targets = self._originals(batches)
        student.load_outside()  # before any of it is changed
        self._head()

    def tell(self, detail: str) -> None:
        self.progress.advance(1, detail)

    # ---- what can be tuned

    def _names(self, part: int) -> list[str]:
        """The parameters of a part that are wanted."""
        student, specs = self.student, self.student.specs
        ends = {student.architecture.embedding.linears[0], student.architecture.head.linears[0]}
        inside = part < student.n_blocks
        slots = student.skeleton.block_tensors(part) if inside else student.skeleton.outside_tensors()
        found = []
        if "norms" in self.wanted:
            for name in slots:
                module, _, suffix = name.rpartition(".")
                one = name in student.reader and len(student.reader.info(name).shape) == 1
                if one and suffix != "bias" and module not in ends and owner(name, specs) is None:
                    found.append(name)
        if "scales" in self.wanted and inside:
            block = student.load_block(part)
            found += [f"{name}.{suffix}" for name, module in self._modules(part) for suffix in module.tunable()]
            del block
            student.unload_block(part)
        return found

    def _modules(self, part: int) -> Iterator[tuple[str, CompressedModule]]:
        """The compressed modules of a block that is loaded, by name on disk."""
        prefix = f"{self.student.architecture.blocks[part]}."
        for name in self.student.specs:
            if name.startswith(prefix):
                module = self.student.skeleton.module(name)
                assert isinstance(module, CompressedModule)
                yield name, module

    def _parameters(self, part: int) -> dict[str, Parameter]:
        """Values and state behind the last whole iteration, gradients 0."""
        stored = self._load(part)
        found = {}
        for name in self.names[part]:
            value = stored[f"value/{name}"] if stored else self.student.reader.read(name, torch.float32)
            relative = name.endswith("scale")  # a table's values are one vector, and one of them may be 0
            state = {
                key.rpartition("/")[2]: tensor for key, tensor in stored.items() if key.startswith(f"state/{name}/")
            }
            found[name] = Parameter(value, torch.zeros(0), relative, state)
        return found

    def _load(self, part: int) -> dict[str, Tensor]:
        return load_file(self._file(part, self.done - 1)) if self.done and self.kept and self.names[part] else {}

    def _save(self, part: int, parameters: Mapping[str, Parameter]) -> None:
        flat = {f"value/{name}": parameter.value.contiguous() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            flat |= {f"state/{name}/{key}": tensor.contiguous() for key, tensor in parameter.state.items()}
        content = save(flat)
        replace_file(self._file(part, self.done), lambda stream: stream.write(content))

    def _file(self, part: int, iteration: int) -> Path:
        return self.scratch / f"{STATE}{part}-{iteration % 2}.safetensors"

    def values(self, part: int) -> dict[str, Tensor]:
        """What is tuned, as it will be stored. Raises: NumericsError."""
        found = {}
        for name, parameter in self._parameters(part).items():
            value = parameter.value.to(TORCH_DTYPES[self.student.reader.info(name).dtype])
            if not torch.isfinite(value).all():
                raise NumericsError(f"{name}: is not finite after tuning; use a smaller lr")
            found[name] = value
        return found

    # ---- one block, or what is outside

    def _block(self, part: int, start: bool = False) -> nn.Module:
        reader = TunedReader(self.student.reader, {} if start else self.values(part))
        try:
            return self.student.load_block(part, reader)
        finally:
            reader.close()

    def _outside(self, start: bool = False) -> None:
        """Put the values of what is outside the blocks in place."""
        part = self.student.n_blocks
        own = {name: self.student.reader.read(name) for name in self.names[part]} if start else self.values(part)
        slots = self.student.skeleton.outside_tensors()
        for name, value in own.items():
            module, attribute = slots[name]
            getattr(module, attribute).data.copy_(value)

    def _head(self) -> None:
        for model in (self.student, self.teacher):
            model.load_head()
            head = model.skeleton.module(model.architecture.head.linears[0])
            if isinstance(head, CompressedModule):
                head.hold(model.dtype)  # its compressed forward need not be differentiable

    @torch.no_grad()
    def _originals(self, batches: list[Tensor]) -> HiddenStates:
        """What leaves the original's last block."""
        teacher = self.teacher
        hidden = embedded(teacher.embed, batches, self.allowance, self.scratch)
        for index in range(teacher.n_blocks):
            block = teacher.load_block(index)
            for batch in range(len(hidden)):
                hidden[batch] = teacher.call_block(block, index, hidden[batch].to(teacher.device))
            teacher.unload_block(index)
        self._at = [(batch, row) for batch, ids in enumerate(batches) for row in range(len(ids))]
        return hidden

    def _target(self, rows: list[int]) -> Tensor:
        return torch.stack([self.targets[batch][row] for batch, row in (self._at[r] for r in rows)])

    # ---- forth and back

    def divergence(self, rows: list[int], start: bool = False) -> float:
        total = tokens = 0.0
        with torch.no_grad():
            self._outside(start)
            parts = self._parts(rows)
            states = self._states(parts, 1)
            self._forth(parts, states, start, keep=False)
            for place, part in enumerate(parts):
                n_tokens = sum(self.lengths[row] for row in part)
                total += self._loss(states[place], part, n_tokens)[0] * n_tokens
                tokens += n_tokens
            states.close()
        return total / tokens

    def descend(self, rows: list[int], update: Update) -> float:
        student, n_blocks, parts = self.student, self.student.n_blocks, self._parts(rows)
        self._outside()
        states = self._states(parts, n_blocks + 1)
        with torch.no_grad():
            self._forth(parts, states, start=False, keep=True)
        n_tokens, loss = sum(self.lengths[row] for row in rows), 0.0
        outside = {name: _slot(student.skeleton.outside_tensors()[name]) for name in self.names[n_blocks]}
        gradients: list[Tensor] = []
        with torch.enable_grad(), _wanting(outside.values()):
            for place, part in enumerate(parts):
                found, gradient = self._loss(states[n_blocks * len(parts) + place], part, n_tokens)
                loss, gradients = loss + found, [*gradients, gradient]
            self._update(n_blocks, {name: _gradient(tensor) for name, tensor in outside.items()}, update)
        for index in reversed(range(n_blocks)):
            self._back(index, parts, states, gradients, update)
        states.close()
        self.done += 1
        write_json(self.scratch / DONE, {"done": self.done})
        return loss

    def _back(
        self, index: int, parts: list[list[int]], states: HiddenStates, gradients: list[Tensor], update: Update
    ) -> None:
        """The gradient by what enters block `index` takes the place of that by its outputs."""
        student = self.student
        block = self._block(index)
        modules = dict(self._modules(index))
        slots = student.skeleton.block_tensors(index)
        norms = {
            name: _slot(slots[name]) for name in self.names[index] if name in slots and owner(name, modules) is None
        }
        tuned = {name: module for name, module in modules.items() if "scales" in self.wanted and module.tunable()}
        held = [module.held for module in tuned.values() if module.held is not None]
        with torch.enable_grad(), _wanting([*norms.values(), *held]):
            for place in range(len(parts)):
                x = states[index * len(parts) + place].to(student.device).detach().requires_grad_(index > 0)
                output = student.call_block(block, index, x)
                output.backward(gradients[place].to(output))
                if x.grad is not None:
                    gradients[place] = x.grad
            found = {name: _gradient(tensor) for name, tensor in norms.items()}
            for name, module in tuned.items():
                assert module.held is not None
                by_weight = _gradient(module.held)
                with torch.no_grad():
                    of_module = module.tuning_gradients(by_weight)
                found |= {f"{name}.{suffix}": gradient for suffix, gradient in of_module.items()}
        student.unload_block(index)
        del block, modules, tuned, held, norms
        release_free_memory()
        self._update(index, found, update)

    def _update(self, part: int, gradients: Mapping[str, Tensor], update: Update) -> None:
        parameters = self._parameters(part)
        for name, parameter in parameters.items():
            parameter.gradient = gradients[name].float().cpu()
        with torch.no_grad():
            update(parameters)
        if parameters:
            self._save(part, parameters)

    def _parts(self, rows: list[int]) -> list[list[int]]:
        return list(alike(rows, self.lengths, self.at_once))

    def _states(self, parts: list[list[int]], copies: int) -> HiddenStates:
        width = self.targets.shapes[0][-1]
        shapes: list[tuple[int, ...]] = [(len(part), self.lengths[part[0]], width) for part in parts]
        shapes *= copies
        return HiddenStates(shapes, self.student.dtype, self.allowance, self.scratch)

    def _forth(self, parts: list[list[int]], states: HiddenStates, start: bool, keep: bool) -> None:
        """Fill `states` with what enters block 0; with what leaves each block in turn, behind that (`keep`) or in its place."""
        student = self.student
        for place, part in enumerate(parts):
            states[place] = student.embed(torch.stack([self.rows[row] for row in part]))
        for index in range(student.n_blocks):
            block = self._block(index, start)
            for place in range(len(parts)):
                entering = (index * len(parts) if keep else 0) + place
                output = student.call_block(block, index, states[entering].to(student.device))
                states[entering + (len(parts) if keep else 0)] = output
            student.unload_block(index)

    def _loss(self, hidden: Tensor, rows: list[int], n_tokens: int) -> tuple[float, Tensor]:
        """The divergence, summed over the tokens of `rows` and divided by `n_tokens`; its gradient by `hidden`, where gradients
        are on, and by what is outside the blocks, added up there."""
        student, teacher = self.student, self.teacher
        wanted = torch.is_grad_enabled()
        hidden = hidden.to(student.device).detach().requires_grad_(wanted)
        normed = student.final_norm(hidden).flatten(0, 1)
        with torch.no_grad():
            original = teacher.final_norm(self._target(rows).to(teacher.device)).flatten(0, 1)
        size = max(MIN_CHUNK_TOKENS, LOGIT_BYTES // (4 * student.architecture.vocab_size))
        total, gradients = 0.0, []
        for ours, theirs in zip(normed.detach().split(size), original.split(size), strict=True):
            ours = ours.requires_grad_(wanted)
            with torch.no_grad():
                expected = teacher.logits(theirs[None])[0].float().log_softmax(-1)
            found = student.logits(ours[None])[0].float().log_softmax(-1)
            value = torch.nn.functional.kl_div(found, expected, log_target=True, reduction="sum") / n_tokens
            total += float(value.detach())
            if wanted:
                gradients.append(torch.autograd.grad(value, ours)[0])
        if not wanted:
            return total, hidden
        normed.backward(torch.cat(gradients))
        assert hidden.grad is not None
        return total, hidden.grad

    # ---- the end

    @torch.no_grad()
    def probe(self, ids: Tensor) -> Tensor:
        """What leaves the last block for token ids [1, length]."""
        self._outside()
        hidden = self.student.embed(ids)
        for index in range(self.student.n_blocks):
            hidden = self.student.call_block(self._block(index), index, hidden)
            self.student.unload_block(index)
        return hidden

    def tensors(self) -> dict[str, int]:
        """The part of each tensor that is tuned."""
        return {name: part for part, names in enumerate(self.names) for name in names}

    def close(self) -> None:
        self.targets.close()
        self.teacher.close()


def _slot(slot: tuple[nn.Module, str]) -> Tensor:
    module, attribute = slot
    tensor: Tensor = getattr(module, attribute)
    return tensor


def _gradient(tensor: Tensor) -> Tensor:
    """The gradient that came to it; 0 where none did: of an expert that no token reached."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


@contextmanager
def _wanting(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Gradients of `tensors` are wanted while it lasts, and gone behind it."""
    own = list(tensors)
    for tensor in own:
        tensor.requires_grad_(True)
    try:
        yield
    finally:
        for tensor in own:
            tensor.requires_grad_(False)
            tensor.grad = None
