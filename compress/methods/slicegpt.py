"""SliceGPT: a narrower residual stream. Every block has a basis of its own, and keeps its first directions.

Row vectors x [D]. Norms are folded into their readers and, where they are LayerNorm, the stream is centred, so that every
norm is x / rms(x), which sees no orthogonal Q: rms(x Q) = rms(x). Behind norm k the stream is carried as x Q_k, Q_k [D, d] with
orthonormal columns:

    embeddings  E <- E Q_0          readers of norm k  W <- W Q_k         writers between norms k and k+1  W <- Q_{k+1}^T W
    shortcuts   A_k = Q_k^T Q_{k+1}                                       head  W <- W Q_last

    h = x A_attn + attention(x / rms),    y = h A_mlp + mlp(h / rms)

At d = D this is exact. Below, what passes norm k is projected on d directions: the principal ones, by Σ x x^T (not centred) over
the calibration tokens, of the stream as the blocks before, sliced, leave it. The last writer goes back to D entries
(`slice_head`: to d), which costs little and loses nothing.

What a sliced block does is, in the original basis, S <- S P with P = Q Q^T wherever the stream enters a norm. So the
model that is looked at is the original one, its two branches run on projected hidden states, and nothing is rotated meanwhile:

    S = embeddings;   per block   Q = PCA(S);  h = S P + attention(norm(S P));  Q' = PCA(h);  S = h P' + mlp(norm(h P'))

That is one forward of each block; the public code, which rotates as it goes, runs every block twice. LayerNorm of a stream that
is centred is the rms norm, also behind P: the direction of equal entries comes last in Q and is the first to be cut.

Q is found in float64 and kept in float32, finer than checkpoints store weights; products of it, with weights and with each other,
are float64 again and rounded once. d is rounded down to a multiple of 8: the matrix units of GPUs read 16 bytes at a time, which
are 8 numbers of 16 bits.

Departures from the public code: shortcuts are formed in float64, not in the dtype of the model; a stream is centred for
LayerNorm only; eps of norms is the model's own; no damping of Σ x x^T, which would move no eigenvector.

Source: Ashkboos et al., 2024, SliceGPT, arXiv:2401.15024.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cache, lru_cache
from math import prod
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.calibration.store import HiddenStates
from compress.errors import RecipeError
from compress.linalg.hadamard import random_orthogonal
from compress.linalg.principal import principal_basis
from compress.methods.base import Extent, MethodConfig
from compress.methods.rewrite import Found, ModelMethod, ModelShape, ModelView, Rewrite
from compress.methods.slicegpt_tensors import sliced_tensors
from compress.models.derived import Derived
from compress.models.stream import Stream
from compress.models.structure import Structure

SPARSITY = 0.25  # where nothing else is asked for
BASES_IN_MEMORY = 2  # a block has three; tensors of one norm come one after the other
EIGH_FLOPS = 10  # n^3, of all eigenvectors of a symmetric matrix
QR_FLOPS = 4  # n^3


class SliceGPTConfig(MethodConfig):
    sparsity: float | None = Field(
        None, ge=0, lt=1, description="fraction of the residual stream's entries that is cut off [default: 0.25]"
    )
    keep_ratio: float | None = Field(
        None,
        gt=0,
        le=1,
        description="bytes of the whole model, tables and head included, as a fraction of the source's: the widest stream that "
        "fits, in place of sparsity",
    )
    round_to: int = Field(8, ge=1, description="the width is rounded down to a multiple of it")
    slice_head: bool = Field(False, description="the stream behind the last block is cut as well, and the head with it")
    orientation: Literal["random", "pca"] = Field(
        "random",
        description="of the directions that stay: mixed, so that values are spread evenly over entries, or the longest first",
    )

    @model_validator(mode="after")
    def _one_size(self) -> SliceGPTConfig:
        if self.sparsity is not None and self.keep_ratio is not None:
            raise ValueError("sparsity and keep_ratio are two ways to say how much is cut; give one of them")
        return self


class SliceGPT(ModelMethod):
    name = "slicegpt"
    summary = "a narrower residual stream: each block keeps the principal directions of what enters it"
    Config = SliceGPTConfig

    @classmethod
    def observes(cls, config: SliceGPTConfig) -> bool:
        return True

    @classmethod
    def rewrite(cls, model: ModelShape, config: SliceGPTConfig, found: Found) -> Rewrite:
        stream = sliceable(model)
        width = width_of(model, stream, config)
        last_width = last_width_of(stream, config, width)

        @lru_cache(maxsize=BASES_IN_MEMORY)
        def basis(norm: int) -> Tensor:
            return found.tensor(basis_name(norm))

        tensors, removed = sliced_tensors(model, stream, width, last_width, basis)
        before, after = _numbers(model, {}, frozenset()), _numbers(model, tensors, removed)
        warnings = []
        if after >= before:
            warnings.append(
                f"the sliced model has {after:,} numbers, the original {before:,}: shortcuts and a head of its own outweigh what "
                f"is cut; slice more, or use keep_ratio"
            )
        if last_width < stream.size and not config.slice_head:
            warnings.append(
                f"{model.title}: transformers gives what leaves the last block the width of the embeddings, so the head is "
                f"sliced too, as by slice_head"
            )
        return Rewrite(
            tensors=tensors,
            removed=removed,
            untied=stream.tied,
            structure=Structure(
                rms=True, biases=f"{stream.final_norm}.bias" in model.shapes, width=width, last_width=last_width
            ),
            note=f"the residual stream has {width} of {stream.size} entries ({1 - width / stream.size:.1%} sliced), the model "
            f"{after / before:.1%} of its numbers",
            warnings=tuple(warnings),
        )

    @classmethod
    @torch.no_grad()
    def observe(cls, view: ModelView, config: SliceGPTConfig) -> dict[str, Any]:
        stream = sliceable(view.shape)
        width = width_of(view.shape, stream, config)
        lost: list[float] = []

        def sliced(hidden: HiddenStates, columns: int = width) -> Tensor:
            """The basis of the next norm, by the hidden states that enter it."""
            norm = len(lost)

            @cache
            def principal() -> tuple[Tensor, float]:
                return principal_basis(second_moment(hidden, view.device), columns, stream.layer_norm)

            def oriented() -> Tensor:
                directions = principal()[0]
                if config.orientation == "random":
                    mixing = random_orthogonal(width, view.generator(f"orientation of norm {norm}"))
                    directions = torch.cat([directions[:, :width] @ mixing.to(directions), directions[:, width:]], 1)
                return directions.float().cpu()

            q = view.keep(basis_name(norm), oriented)
            lost.append(view.remember(f"lost at norm {norm}", lambda: principal()[1]))
            return q

        n_tokens = sum(ids.numel() for ids in view.batches)
        if n_tokens < width:
            view.note(
                f"slicegpt: {n_tokens} calibration tokens reach at most as many of {width} directions, the others are kept by "
                f"chance; use more calibration.samples"
            )
        hidden = view.embedded()
        try:
            for batch in range(len(hidden)):
                hidden[batch] = _centred(hidden[batch], stream)
            with view.track("observe", view.shape.n_blocks, "block") as advance:
                for index in range(view.shape.n_blocks):
                    with view.loaded(index) as block:
                        for kind in ("attention", "mlp"):
                            q = sliced(hidden)
                            for batch in range(len(hidden)):
                                x = projected(hidden[batch].to(view.device), q)
                                hidden[batch] = x + _centred(block.branch(kind, x), stream).to(x)
                    advance(f"loses {lost[-2]:.2%} and {lost[-1]:.2%} of the stream's energy")
            sliced(hidden, last_width_of(stream, config, width))
        finally:
            hidden.close()
        return {"width": width, "energy_lost": lost}

    @classmethod
    def observation_bytes(cls, extent: Extent, config: SliceGPTConfig) -> int:
        n = extent.hidden_size
        return 8 * (6 * n * n + 2 * extent.batch_tokens * n)  # moment, eigenvectors, workspace, Q; a batch in float64

    @classmethod
    def kept_bytes(cls, model: ModelShape, config: SliceGPTConfig) -> int:
        """A basis for each norm: two in a block, one behind the last."""
        stream = sliceable(model)
        width = width_of(model, stream, config)
        return 4 * stream.size * (2 * model.n_blocks * width + last_width_of(stream, config, width))

    @classmethod
    def observation_flops(cls, extent: Extent, config: SliceGPTConfig) -> float:
        n = extent.hidden_size
        norms = 2 * extent.n_blocks + 1
        per_token = 2.0 * 3 * n * n  # moment and projection
        return 2.0 * extent.n_weights * extent.n_tokens + norms * (
            per_token * extent.n_tokens + (EIGH_FLOPS + QR_FLOPS + 2) * n**3
        )

    @classmethod
    def flops(cls, extent: Extent, config: SliceGPTConfig) -> float:
        return 2.0 * extent.n_weights * extent.hidden_size


def sliceable(model: ModelShape) -> Stream:
    """Its stream. Raises: RecipeError by name and with the reason if it cannot be cut."""
    stream = model.stream()
    if stream.parallel:
        raise RecipeError(
            f"{model.title}: attention and MLP of a block run side by side (use_parallel_residual): nothing lies between them "
            f"that a second basis could be found for; slicegpt is for blocks whose MLP reads what attention has added to"
        )
    return stream


def width_of(model: ModelShape, stream: Stream, config: SliceGPTConfig) -> int:
    """Entries of the sliced stream. Raises: RecipeError naming the setting that leaves none."""
    step = config.round_to
    if config.keep_ratio is None:
        sparsity = SPARSITY if config.sparsity is None else config.sparsity
        wanted = int((1 - sparsity) * stream.size + 1e-9)
        width = stream.size if sparsity == 0 else wanted // step * step
        if width == 0:
            raise RecipeError(
                f"sparsity={sparsity}: leaves {wanted} of {stream.size} entries, fewer than round_to={step}; slice less"
            )
        return width

    if step > stream.size:
        raise RecipeError(
            f"round_to={step}: is more than the {stream.size} entries of the stream; use a smaller round_to"
        )

    def nbytes(width: int) -> int:
        last = last_width_of(stream, config, width)
        return model.float_bytes * _numbers(model, *sliced_tensors(model, stream, width, last, None))

    source = sum(model.nbytes.values())
    widths = range(step, stream.size + 1, step)
    fitting = bisect_right(widths, int(config.keep_ratio * source), key=nbytes)
    if fitting == 0:
        least = nbytes(step) / source
        raise RecipeError(
            f"keep_ratio={config.keep_ratio}: no width fits; {step} entries already take {least:.3f} of the source, with what "
            f"slicing leaves as it is; use a larger keep_ratio"
        )
    return widths[fitting - 1]


def last_width_of(stream: Stream, config: SliceGPTConfig, width: int) -> int:
    """Entries behind the last block."""
    return width if config.slice_head or stream.one_width else stream.size


def basis_name(norm: int) -> str:
    """Under which the basis of a norm is kept; norms are counted through the model, the final one last."""
    return f"basis-{norm:04d}"


def second_moment(hidden: HiddenStates, device: torch.device) -> Tensor:
    """Σ x x^T over all tokens [D, D], float64."""
    moment = None
    for batch in range(len(hidden)):
        x = hidden[batch].to(device).flatten(0, -2).double()
        moment = x.T @ x if moment is None else moment.addmm_(x.T, x)
    assert moment is not None
    return moment


def projected(x: Tensor, q: Tensor) -> Tensor:
    """x Q Q^T, for x [..., D] and Q [D, d] of orthonormal columns."""
    if q.shape[0] == q.shape[1]:
        return x
    q = q.to(x.device, torch.float32)
    return ((x.float() @ q) @ q.T).to(x.dtype)


def _centred(x: Tensor, stream: Stream) -> Tensor:
    return x - x.mean(-1, keepdim=True) if stream.layer_norm else x


def _numbers(model: ModelShape, tensors: dict[str, Derived], removed: frozenset[str]) -> int:
    """In all tensors of the model."""
    kept = (shape for name, shape in model.shapes.items() if name not in tensors and name not in removed)
    return sum(map(prod, kept)) + sum(prod(tensor.shape) for tensor in tensors.values())
