"""A model run from its files, block by block: never more than one block, the small outer parts and the head in memory.

Original checkpoints and compressed ones (compressed-tensors or our own format) are the same to everyone who uses this:
the pass that compresses, the replay of an interrupted run, the evaluation.

How a model family wires its blocks is never written down here. The outer model of transformers runs with the blocks'
`forward` replaced: once to record what each block is called with (masks and rotary tables differ by block), and once to
bring the last hidden states through the final norm.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.checkpoint.budget import Budget
from compress.checkpoint.description import modules_of
from compress.checkpoint.headers import read_json
from compress.checkpoint.names import owner
from compress.checkpoint.reader import CheckpointReader
from compress.checkpoint.translate import open_reader
from compress.errors import CheckpointError, CompressError, naming
from compress.models.architecture import Architecture
from compress.models.families import architecture_of, is_ignored
from compress.models.skeleton import Skeleton
from compress.modules.base import CompressedModule
from compress.modules.registry import module_class
from compress.modules.spec import ModuleSpec

KEPT_ARGUMENT_BYTES = 256 * 2**20  # recorded masks and rotary tables, before they are recorded anew at each use
HEAD_TILE = 8192  # rows of the head converted at a time


class _ReachedError(Exception):
    """The last block was called: nothing after it is wanted."""


class StreamedModel:
    """A checkpoint folder whose blocks are loaded, run and dropped one at a time.

    Args:
        folder: an original or compressed checkpoint.
        dtype: the dtype in which everything is computed.
        device: where it is computed.
        reader: tensors of the folder, where they are not (all) in finished files yet; by default the folder's own.
        specs: the compressed modules by disk name; by default those that config.json describes.
        budget: how much of a stack is to be there; by default all.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        reader: CheckpointReader | None = None,
        specs: dict[str, ModuleSpec] | None = None,
        trust_remote_code: bool = False,
        budget: Budget | None = None,
    ):
        raw = read_json(folder / "config.json")
        self.folder, self.dtype, self.device = folder, dtype, torch.device(device)
        self.reader = reader or open_reader(folder, raw, budget)
        with naming(folder):
            self.specs = modules_of(raw, self.reader.infos) if specs is None else specs
            self.architecture = architecture_of(raw, self.reader.infos.keys())
        self.config, self.skeleton = _built(folder, self.architecture, dtype, trust_remote_code)
        if not self.architecture.structure.plain:
            self._check_known()
        self.table_reader: CheckpointReader | None = None  # of the token table, where it has been written already
        self._backbone = _parent_of_blocks(self.skeleton.model, self.skeleton.blocks[0])
        self._calls: dict[tuple[int, int], list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._kept_bytes = 0
        self._outside_loaded = False
        self._head_loaded = False

    @property
    def n_blocks(self) -> int:
        return len(self.skeleton.blocks)

    # ---- blocks

    def load_block(
        self, index: int, reader: CheckpointReader | None = None, specs: dict[str, ModuleSpec] | None = None
    ) -> nn.Module:
        """Block `index` with its weights, compressed modules included, ready to run. `unload_block` drops it.

        Args:
            reader, specs: of another checkpoint of the same model than the one that was opened.
        """
        reader = reader or self.reader
        specs = self.specs if specs is None else specs
        block = self.skeleton.blocks[index]
        names = list(self.skeleton.block_tensors(index))
        self._fill(names, reader, specs, f"{self.architecture.blocks[index]}.")
        return block

    def unload_block(self, index: int) -> None:
        self.skeleton.empty_block(index)

    def _check_known(self) -> None:
        """Every stored tensor has a place: a structure that says too much or too little would leave some aside.

        Raises: CheckpointError naming the first that has none.
        """
        head = self.architecture.head.linears[0]
        places = {*self.skeleton.outside_tensors(), f"{head}.weight"}
        for index in range(self.n_blocks):
            places |= self.skeleton.block_tensors(index).keys()
        for name in self.reader.infos:
            if name not in places and owner(name, self.specs) is None and not is_ignored(name):
                raise CheckpointError(
                    f"{self.folder}: tensor {name} has no place in the model that config.json describes "
                    f"(quantization_config.structure); the two are not of one model: fetch both again"
                )

    def check_finite(self, index: int) -> None:
        """Raises: CheckpointError naming the first tensor of the loaded block that holds NaN or infinity."""
        for name, (module, attribute) in self.skeleton.block_tensors(index).items():
            tensor = getattr(module, attribute)
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise CheckpointError(
                    f"{self.reader.info(name).file}: tensor {name} holds NaN or infinity; the checkpoint is damaged: "
                    f"fetch it again"
                )

    def _fill(self, names: list[str], reader: CheckpointReader, specs: dict[str, ModuleSpec], prefix: str) -> None:
        replaced = {name: spec for name, spec in specs.items() if name.startswith(prefix)}
        for name, spec in replaced.items():
            module = load_module(name, spec, reader, self.dtype).to(self.device)
            module.hold(self.dtype)
            self.skeleton.replace(name, module)
        for name in names:
            if name.rpartition(".")[0] not in replaced:
                self.skeleton.fill(name, reader.read(name, self.dtype).to(self.device))

    # ---- the way in

    def embed(self, ids: Tensor) -> Tensor:
        """The hidden states that enter block 0, for token ids [batch, length]."""
        self.load_outside()
        table = self.skeleton.module(self.architecture.embeddings[0])
        if not isinstance(table, CompressedModule):
            rows, ids = ids.unique(return_inverse=True)  # only the rows that occur are read
            name = f"{self.architecture.embeddings[0]}.weight"
            weight = (self.table_reader or self.reader).read_rows(name, rows, self.dtype).to(self.device)
            table.weight = nn.Parameter(weight, requires_grad=False)
            table.padding_idx = None  # type: ignore[assignment]  # for gradients only; would have to be among the rows
        entered: list[Tensor] = []

        def enter(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            entered.append(hidden_states)
            raise _ReachedError

        with self._blocks_replaced([enter] * self.n_blocks), torch.no_grad(), suppress(_ReachedError):
            self._backbone(input_ids=ids.to(self.device), use_cache=False)
        return entered[0].clone()

    def call_block(self, block: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Run block `index` on hidden states [batch, length, hidden_size], with the arguments the model gives it."""
        args, kwargs = self.block_arguments(index, (hidden.shape[0], hidden.shape[1]))
        output = block(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def block_arguments(self, index: int, shape: tuple[int, int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model passes to block `index` beside the hidden states, for inputs [batch, length] without padding."""
        calls = self._calls.get(shape)
        if calls is None:
            calls = self._record(shape)
            nbytes = sum(t.nbytes for t in {id(t): t for call in calls for t in tensors_in(call)}.values())
            if self._kept_bytes + nbytes <= KEPT_ARGUMENT_BYTES:
                self._calls[shape] = calls
                self._kept_bytes += nbytes
        return calls[index]

    def _record(self, shape: tuple[int, int]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        self.load_outside()
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def record(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            calls.append((args, kwargs))
            if len(calls) == self.n_blocks:
                raise _ReachedError
            return hidden_states

        zeros = torch.zeros(*shape, self._table_width(), dtype=self.dtype, device=self.device)
        with self._blocks_replaced([record] * self.n_blocks), torch.no_grad(), suppress(_ReachedError):
            self._backbone(inputs_embeds=zeros, use_cache=False)
        return calls

    # ---- the way out

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The last block's output, through the final norm (and projection, where a family has one). Differentiable."""
        self.load_outside()

        def substitute(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return hidden

        zeros = torch.zeros(*hidden.shape[:2], self._table_width(), dtype=self.dtype, device=self.device)
        with self._blocks_replaced([substitute] * self.n_blocks):
            return self._backbone(inputs_embeds=zeros, use_cache=False).last_hidden_state

    def logits(self, normed: Tensor) -> Tensor:
        """Logits [batch, length, vocabulary] of final normed hidden states, with whatever the family does after its head.
        Differentiable, unless the head is compressed."""
        from transformers.modeling_outputs import BaseModelOutputWithPast

        class Output(BaseModelOutputWithPast):
            """Families look for outputs of their own (cross attentions, router logits): none of them is there."""

            def __getattr__(self, name: str) -> None:
                return None

        self.load_head()
        zeros = torch.zeros(normed.shape[:2], dtype=torch.long, device=self.device)
        self._backbone.forward = lambda *args, **kwargs: Output(last_hidden_state=normed)
        try:
            return self.skeleton.model(input_ids=zeros, use_cache=False).logits
        finally:
            del self._backbone.forward

    def load_head(self) -> None:
        """Load the head, in its stored dtype (a head in float32 can outweigh a block); rows are converted as they are used."""
        if self._head_loaded:
            return
        self._head_loaded = True
        name = self.architecture.head.linears[0]
        if name in self.specs:
            module = load_module(name, self.specs[name], self.reader, self.dtype)
            self.skeleton.replace(name, module.to(self.device))
            return
        tied_to = self.architecture.embeddings[0]
        if self.architecture.tied and tied_to in self.specs:
            weight = load_module(tied_to, self.specs[tied_to], self.reader, self.dtype).dense(self.dtype)
        else:
            weight = self.reader.read(f"{tied_to if self.architecture.tied else name}.weight")
        bias = self.reader.read(f"{name}.bias", self.dtype) if f"{name}.bias" in self.reader else None
        self.skeleton.replace(name, TiledHead(weight, bias).to(self.device))

    def unload_head(self) -> None:
        """Let go of the head."""
        if self._head_loaded:
            self.skeleton.replace(self.architecture.head.linears[0], nn.Identity())
            self._head_loaded = False

    # ---- shared

    def whole(self) -> nn.Module:
        """The model with all its weights: a causal language model of transformers, experts unfused."""
        self.load_outside()
        inside = {name for index in range(self.n_blocks) for name in self.skeleton.block_tensors(index)}
        self._fill([*self.skeleton.outside_tensors(), *inside], self.reader, self.specs, "")
        if self.architecture.tied and self.architecture.embeddings[0] in self.specs:
            self.load_head()
        return self.skeleton.model

    def _table_width(self) -> int:
        table = self.architecture.embeddings[0]
        return self.specs[table].in_features if table in self.specs else self.reader.info(f"{table}.weight").shape[1]

    def replace_table(self, module: CompressedModule) -> None:
        """Use a compressed token table from here on."""
        name = self.architecture.embeddings[0]
        module.adopt(self.skeleton.module(name))
        self.skeleton.replace(name, module.to(self.device))

    def replace_head(self, module: nn.Module) -> None:
        """Use another head from here on."""
        self._head_loaded = True
        self.skeleton.replace(self.architecture.head.linears[0], module.to(self.device))

    def load_outside(self) -> None:
        """The small parts outside the blocks: norms, position tables, projections. Not the token table, not the head."""
        if self._outside_loaded:
            return
        self._outside_loaded = True
        table, head = self.architecture.embeddings[0], self.architecture.head.linears[0]
        for name in self.skeleton.outside_tensors():
            if name.rpartition(".")[0] not in (table, head):
                self.skeleton.fill(name, self.reader.read(name, self.dtype).to(self.device))
        if table in self.specs:
            self.replace_table(load_module(table, self.specs[table], self.reader, self.dtype))
        for module in self.skeleton.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.device)

    @contextmanager
    def _blocks_replaced(self, forwards: list[Any]) -> Iterator[None]:
        blocks = self.skeleton.blocks
        for block, forward in zip(blocks, forwards, strict=True):
            block.forward = forward
        try:
            yield
        finally:
            for block in blocks:
                del block.forward

    def close(self) -> None:
        self.reader.close()
        if self.table_reader is not None:
            self.table_reader.close()


class TiledHead(nn.Module):
    """A linear whose weight stays in its stored dtype; rows are converted tile by tile when it runs."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return _TiledProduct.apply(x, self.weight, self.bias)


class _TiledProduct(torch.autograd.Function):
    """x W^T + b and its gradient by x; of W, no more than a tile is ever there in the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        out = x.new_empty(*x.shape[:-1], weight.shape[0])
        for rows in _tiles(weight):
            out[..., rows] = functional.linear(x, weight[rows].to(x.dtype), None if bias is None else bias[rows])
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        by_x = gradient.new_zeros(*gradient.shape[:-1], weight.shape[1])
        for rows in _tiles(weight):
            by_x += gradient[..., rows] @ weight[rows].to(gradient.dtype)
        return by_x, None, None


def _tiles(weight: Tensor) -> list[slice]:
    return [slice(first, first + HEAD_TILE) for first in range(0, weight.shape[0], HEAD_TILE)]


def _built(
    folder: Path, architecture: Architecture, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[Any, Skeleton]:
    """The config as transformers reads it, and the model without weights that it builds from it.

    Raises: CheckpointError with the reason if transformers refuses the config, or fails over what stands in it.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return config, Skeleton(config, architecture, dtype)
    except CompressError:
        raise
    except Exception as error:  # each class of transformers checks its config, or does not, in its own way
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(
            f"{folder / 'config.json'}: transformers builds no model from it ({reason:.300}); mend it or fetch it again"
        ) from error


def load_module(name: str, spec: ModuleSpec, reader: CheckpointReader, dtype: torch.dtype) -> CompressedModule:
    """A compressed module from its stored tensors. Float tensors are cast to `dtype`.

    Raises: CheckpointError naming the tensor if one is missing or its shape or dtype is not what `spec` says.
    """
    suffixes = [*spec.tensors("F32"), *(["bias"] if f"{name}.bias" in reader else [])]
    stored = {suffix: reader.read(f"{name}.{suffix}") for suffix in suffixes}
    return rebuild_module(name, spec, stored, dtype, read_lender(spec, reader, dtype))


def read_lender(spec: ModuleSpec, reader: CheckpointReader, dtype: torch.dtype) -> nn.Module | None:
    """A stand-in for the module that lends parts to one of `spec`, with no more than those; None if it borrows nothing."""
    lender = spec.lender()
    if lender is None:
        return None
    part = module_class(spec.representation).part_to_lend(spec, dtype)
    _fill_from(part, lender, {suffix: reader.read(f"{lender}.{suffix}") for suffix in spec.borrowed("F32")})
    return part


def rebuild_module(
    name: str, spec: ModuleSpec, stored: dict[str, Tensor], dtype: torch.dtype, lender: nn.Module | None = None
) -> CompressedModule:
    """A compressed module as it will be when its stored tensors are loaded in `dtype`. `lender`: of what it borrows, a copy of
    which it gets.

    Raises: CheckpointError naming the tensor whose shape or dtype is not what `spec` says.
    """
    module = module_class(spec.representation).from_spec(spec, "bias" in stored, dtype, "meta")
    _fill_from(module, name, stored)
    if lender is not None:
        module.lend(copy.deepcopy(lender).to(dtype))
    for inner, part in module.named_modules(prefix=name):
        if isinstance(part, CompressedModule):
            part.check_stored(inner)
    return module


def _fill_from(module: nn.Module, name: str, stored: dict[str, Tensor]) -> None:
    expected = module.state_dict()
    state = {}
    for suffix, tensor in stored.items():
        wanted = expected[suffix]
        if tensor.shape != wanted.shape or tensor.is_floating_point() != wanted.is_floating_point():
            raise CheckpointError(
                f"{name}.{suffix}: {tensor.dtype} {tuple(tensor.shape)} is stored, but config.json describes "
                f"{wanted.dtype} {tuple(wanted.shape)}; the checkpoint is damaged"
            )
        state[suffix] = tensor.to(wanted.dtype)
    module.load_state_dict(state, assign=True)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors_in(v)]
    if isinstance(value, tuple | list):
        return [t for v in value for t in tensors_in(v)]
    return []


def _parent_of_blocks(model: nn.Module, first_block: nn.Module) -> Any:
    """The module whose forward runs the blocks: the one that holds the list they stand in."""
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) and child[0] is first_block:
                return module
    raise AssertionError("the blocks stand in no ModuleList")
