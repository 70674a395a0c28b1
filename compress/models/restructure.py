"""Changes the modules that transformers built from config.json into those that a `Structure` describes.

    rms        norms become `StreamNorm`: x / sqrt(sum(x^2) / hidden size + eps), without weights
    biases     linears that read the stream get a bias
    width      tables, readers and writers are cut; blocks run with shortcuts A and B:
               h = x A + attention(norm(x)), y = h B + mlp(norm(h))
    hadamard   linears of a site are wrapped: their input is transformed first

The linears keep their names on disk (`families.module_name` knows of the wrapper).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import CheckpointError, RecipeError
from compress.kernels.ops import hadamard_transform
from compress.linalg.hadamard_orders import factors
from compress.models.architecture import Architecture
from compress.models.branches import Branches, named_arguments
from compress.models.experts import UnfusedExperts
from compress.models.families import WRAPPED, module_name
from compress.models.stream import Stream, stream_of_structure


class StreamNorm(nn.Module):
    """x / sqrt(sum(x^2) / size + eps): the norm of a stream whose size was `size` before it was cut. No weights."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.size, self.eps = size, eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().sum(-1, keepdim=True) / self.size + self.eps)
        return (wide * scale).to(x.dtype)

    def extra_repr(self) -> str:
        return f"size={self.size}, eps={self.eps}"


class Transformed(nn.Module):
    """A linear whose input goes through an orthonormal Hadamard transform of blocks of `size` first."""

    def __init__(self, linear: nn.Module, size: int):
        super().__init__()
        self.linear, self.size = linear, size

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(hadamard_transform(x, self.size))

    def __getattr__(self, name: str) -> Any:
        """What is not here is the linear's: models look at the weights of their linears."""
        return super().__getattr__(name) if name == "linear" else getattr(self.linear, name)


class Shortcuts:
    """Mixed into the class of a block: its residual connections pass through matrices."""

    branches: Branches
    attn_shortcut: nn.Linear
    ffn_shortcut: nn.Linear  # with "mlp" in its name transformers would rename it when it saves a Mixtral
    original: type[nn.Module]
    returns_tuple: bool

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty_block, (self.original,), self.__dict__

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert isinstance(self, nn.Module)
        arguments = named_arguments(self, args, kwargs)
        attended = self.branches.run("attention", self, hidden_states, arguments)
        middle = self.attn_shortcut(hidden_states) + attended
        output = self.ffn_shortcut(middle) + self.branches.run("mlp", self, middle, arguments)
        return (output,) if self.returns_tuple else output


def restructure(model: nn.Module, architecture: Architecture, cut: str = "") -> None:
    """Change `model`, on meta, in place.

    Args:
        cut: what names of the whole model begin with, where `model` is the base model alone (and has no head).

    Raises: RecipeError if blocks of this family cannot have shortcuts.
    """
    structure = architecture.structure
    if structure.plain:
        return
    tree = _Tree(model, architecture, cut)
    if structure.rms:
        stream = stream_of_structure(architecture)
        if structure.biases:
            _give_biases(tree, stream)
        _replace_norms(tree, stream)
        if structure.width is not None:
            _cut(tree, stream, structure.width, structure.last_width or structure.width)
    for kind, size in structure.hadamard:
        for site in (site for sites in architecture.block_sites for site in sites if site.kind == kind):
            for name in site.linears:
                tree.replace(name, _transformed(name, tree[name], size, stored_in_out=architecture.transposed))


def _transformed(name: str, linear: nn.Module, size: int, stored_in_out: bool) -> Transformed:
    width = linear.get_parameter("weight").shape[0 if stored_in_out else 1]
    if width % size or factors(size) is None:
        raise CheckpointError(
            f"config.json: quantization_config.structure: hadamard: no Hadamard blocks of {size} fit the {width} inputs of "
            f"{name}; fetch it again"
        )
    return Transformed(linear, size)


class _Tree:
    """The modules of a model by their names on disk, as transformers built them."""

    def __init__(self, model: nn.Module, architecture: Architecture, cut: str):
        self.model, self.architecture, self.cut = model, architecture, cut

    def __getitem__(self, name: str) -> nn.Module:
        return self.model.get_submodule(self._inner(name))

    def replace(self, name: str, module: nn.Module) -> None:
        self.model.set_submodule(self._inner(name), module.train(self.model.training))

    def heads(self, name: str) -> list[str]:
        """The head's name, if the model has one."""
        return [] if self.cut or self._lacks(name) else [name]

    def _lacks(self, name: str) -> bool:
        """Models that are made for another task than the next token have no head, or another."""
        try:
            self[name]
        except AttributeError:
            return True
        return False

    def _inner(self, name: str) -> str:
        return module_name(self.architecture, name).removesuffix(WRAPPED).removeprefix(self.cut)


def _readers(stream: Stream) -> list[str]:
    return [name for branches in stream.branches for branch in branches for name in branch.readers]


def _give_biases(tree: _Tree, stream: Stream) -> None:
    for name in (*_readers(stream), *tree.heads(stream.head)):
        linear = tree[name]
        if linear._parameters.get("bias") is None:
            weight = linear.get_parameter("weight")
            out_features = weight.shape[1 if stream.transposed and name != stream.head else 0]
            empty = torch.empty(out_features, dtype=weight.dtype, device=weight.device)
            linear.register_parameter("bias", nn.Parameter(empty, requires_grad=False))


def _replace_norms(tree: _Tree, stream: Stream) -> None:
    norms = [branch.norm for branches in stream.branches for branch in branches]
    for name in (*norms, stream.final_norm):
        norm: Any = tree[name]
        eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
        tree.replace(name, StreamNorm(stream.size, float(eps)))


def _cut(tree: _Tree, stream: Stream, width: int, last_width: int) -> None:
    architecture = tree.architecture
    if stream.parallel:
        raise RecipeError(
            f"{architecture.model_type}: attention and MLP run side by side; its blocks have no shortcuts"
        )
    for name in stream.embeddings:
        table = tree[name]
        _resize(table, (table.get_parameter("weight").shape[0], width))
        table.embedding_dim = width  # type: ignore[assignment]
    for index, branches in enumerate(stream.branches):
        final = last_width if index == architecture.n_blocks - 1 else width
        for branch, behind in zip(branches, (width, final), strict=True):
            for name in branch.readers:
                _cut_linear(tree[name], stream.transposed, in_features=width)
                if hasattr(tree[name], "hidden_dim"):  # a router
                    tree[name].hidden_dim = width  # type: ignore[assignment]
            for name in branch.writers:
                _cut_linear(tree[name], stream.transposed, out_features=behind)
        block = tree[architecture.blocks[index]]
        for module in block.modules():
            if isinstance(module, UnfusedExperts):
                module.out_features = final
        dtype = next(iter(block.parameters())).dtype
        for attribute, behind in (("attn_shortcut", width), ("ffn_shortcut", final)):
            with torch.device("meta"):
                block.add_module(attribute, nn.Linear(width, behind, bias=False, dtype=dtype))
        _with_shortcuts(block, Branches(architecture, index))
    for name in tree.heads(stream.head):
        _cut_linear(tree[name], False, in_features=last_width)


def _with_shortcuts(block: nn.Module, branches: Branches) -> None:
    """Only `forward` changes: transformers looks at the class of blocks to place them on devices."""
    block.__class__ = _shortcut_class(type(block))  # type: ignore[arg-type]
    block.branches = branches  # type: ignore[assignment]
    block.requires_grad_(False)


@lru_cache(maxsize=64)
def _shortcut_class(original: Any) -> type[nn.Module]:
    annotation = str(original.forward.__annotations__.get("return", "")).lower()
    fields = {"original": original, "original_forward": original.forward, "returns_tuple": "tuple" in annotation}
    return type(original.__name__, (Shortcuts, original), fields)


def _empty_block(original: type[nn.Module]) -> nn.Module:
    """For copies and pickles, which then fill it."""
    cls = _shortcut_class(original)  # type: ignore[arg-type]
    return cls.__new__(cls)


def _cut_linear(
    linear: nn.Module, transposed: bool, in_features: int | None = None, out_features: int | None = None
) -> None:
    rows, columns = linear.get_parameter("weight").shape
    if transposed:
        rows, columns = in_features or rows, out_features or columns
        linear.nx, linear.nf = rows, columns  # type: ignore[assignment]
    else:
        rows, columns = out_features or rows, in_features or columns
        linear.out_features, linear.in_features = rows, columns  # type: ignore[assignment]
    _resize(linear, (rows, columns))
    if out_features is not None and linear._parameters.get("bias") is not None:
        _resize(linear, (out_features,), "bias")


def _resize(module: nn.Module, shape: tuple[int, ...], name: str = "weight") -> None:
    old = module.get_parameter(name)
    empty = torch.empty(shape, dtype=old.dtype, device=old.device)
    module.register_parameter(name, nn.Parameter(empty, requires_grad=False))
