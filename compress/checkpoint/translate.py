"""Tensors of the GPTQ and AWQ formats into ours, and back.

Our codes are a dense bit stream along `in`, ours and GPTQ's zero points one along `out`, low bits first: GPTQ's tensors are
ours transposed. Only the zero points of its first version are stored less one. AWQ packs along `out`, interleaved.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from compress.checkpoint.budget import Budget
from compress.checkpoint.foreign import AWQ, AWQ_BITS, TRANSLATED, Layout, Translated, translated
from compress.checkpoint.headers import TensorInfo, read_headers, read_json
from compress.checkpoint.reader import CheckpointReader
from compress.errors import CheckpointError, naming
from compress.kernels.packing import pack, unpack
from compress.modules.quantized import QuantizedLinear, QuantizedModule
from compress.modules.quantized_spec import n_words

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column that each four bits of a word hold
PER_WORD = 8


def to_gptq(stored: dict[str, Tensor], bits: int, group_size: int, less_one: bool) -> dict[str, Tensor]:
    """Our tensors of a module as GPTQ's. Without zero points they are the middle of the grid, 2^(bits-1).

    Args:
        stored: weight_packed, weight_scale, weight_zero_point if asymmetric; in and out divisible as the format needs.
        less_one: store zero points less one; they must not be 0.
    """
    scale = stored["weight_scale"]  # [out, groups]
    out, groups = scale.shape
    in_features = stored["weight_packed"].shape[1] * 32 // bits
    zero_point = stored.get("weight_zero_point")
    if zero_point is None:
        zero_point = pack(torch.full((groups, out), 2 ** (bits - 1), dtype=torch.uint8, device=scale.device), bits).T
    qzeros = zero_point.T.contiguous()
    if less_one:
        qzeros = pack(unpack(qzeros, bits, out) - 1, bits)
    per_group = in_features if group_size == -1 else group_size
    return {
        "qweight": stored["weight_packed"].T.contiguous(),
        "qzeros": qzeros,
        "scales": scale.T.contiguous(),
        "g_idx": torch.arange(in_features, dtype=torch.int32) // per_group,
    }


def to_awq(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors of a module of 4 bits as AWQ's; `out` is divisible by 8."""
    scale = stored["weight_scale"]
    out, groups = scale.shape
    codes = unpack(stored["weight_packed"], 4, stored["weight_packed"].shape[1] * PER_WORD)
    if "weight_zero_point" in stored:
        zero_point = unpack(stored["weight_zero_point"].T, 4, out)  # [groups, out]
    else:
        zero_point = torch.full((groups, out), 8, dtype=torch.uint8, device=scale.device)
    return {
        "qweight": _interleaved(codes.T),
        "qzeros": _interleaved(zero_point),
        "scales": scale.T.contiguous(),
    }


def _interleaved(values: Tensor) -> Tensor:
    """uint8 [rows, out] -> int32 [rows, out / 8]."""
    words = values.unflatten(1, (-1, PER_WORD))[..., list(AWQ_ORDER)]
    return pack(words.flatten(1), 4)


def _restored(words: Tensor, out: int) -> Tensor:
    """The inverse of `_interleaved`."""
    values = unpack(words, 4, out).unflatten(1, (-1, PER_WORD))
    order = torch.tensor(AWQ_ORDER).argsort()
    return values[..., order].flatten(1)


def to_ours(name: str, layout: Layout, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a `QuantizedLinear` from those of a GPTQ or AWQ module.

    Raises: CheckpointError naming the tensor where our module cannot hold what is stored.
    """
    spec = layout.spec
    scale, qweight, qzeros = tensors["scales"], tensors["qweight"], tensors["qzeros"]
    if layout.method == AWQ:
        packed = pack(_restored(qweight, spec.out_features).T, 4)
        zero_point = _restored(qzeros, spec.out_features)  # [groups, out]
    else:
        packed = qweight.T.contiguous()
        zero_point = _gptq_zero_point(name, layout, qzeros)
        groups = _group_order(name, layout, tensors.get("g_idx"))
        if groups is not None:
            scale, zero_point = scale[groups], zero_point[groups]
    ours = {
        "weight_packed": packed,
        "weight_scale": scale.T.contiguous(),
        "weight_shape": torch.tensor([spec.out_features, spec.in_features]),
    }
    if not spec.symmetric:
        ours["weight_zero_point"] = pack(zero_point, spec.bits).T.contiguous()
    elif bool((zero_point != 2 ** (spec.bits - 1)).any()):
        raise CheckpointError(
            f"{name}.qzeros: config.json says sym=true, but zero points other than {2 ** (spec.bits - 1)} are stored; "
            f"the checkpoint is damaged"
        )
    return ours


def _gptq_zero_point(name: str, layout: Layout, qzeros: Tensor) -> Tensor:
    """uint8 [groups, out]."""
    bits, out = layout.spec.bits, layout.spec.out_features
    largest = 2**bits - 1
    if layout.less_one and layout.whole_words and bits != 3:
        ones = sum(1 << shift for shift in range(0, 32, bits))
        qzeros = ((qzeros.long() + ones) & 0xFFFFFFFF).to(
            torch.int32
        )  # undoes the borrowing of a zero from its neighbour
        return unpack(qzeros, bits, out)
    zero_point = unpack(qzeros, bits, out)
    if not layout.less_one:
        return zero_point
    if not layout.whole_words and bool((zero_point == largest).any()):
        raise CheckpointError(
            f"{name}.qzeros: a stored zero point of {largest} is 0 or {largest + 1}, which checkpoint_format 'gptq' does not "
            f"tell apart; quantize again with checkpoint_format 'gptq_v2'"
        )
    return (zero_point + 1) & largest


def _group_order(name: str, layout: Layout, g_idx: Tensor | None) -> Tensor | None:
    """Where columns form groups of neighbours in another order than that of the scales: the scales' row for each.

    Raises: CheckpointError if columns of one group do not lie together (activation order without static groups).
    """
    if g_idx is None:
        return None
    spec = layout.spec
    grouped = g_idx.long().unflatten(0, (spec.n_groups, -1))  # [groups, group_size]
    order = grouped[:, 0]
    if bool((grouped != order[:, None]).any()) or order.unique().numel() != spec.n_groups:
        raise CheckpointError(
            f"{name}.g_idx: the columns of a group do not lie together (desc_act), which cannot be run here; use a model "
            f"quantized with desc_act=false"
        )
    if int(order.min()) != 0 or int(order.max()) != spec.n_groups - 1:
        raise CheckpointError(f"{name}.g_idx: names groups that there are none of; the checkpoint is damaged")
    return None if bool((order == torch.arange(spec.n_groups)).all()) else order


class Untranslated(nn.Module):
    """Holds the tensors of a GPTQ or AWQ module as they are loaded, until `translated` makes our module of them."""

    def __init__(self, name: str, layout: Layout, bias: bool, dtype: torch.dtype):
        super().__init__()
        self.name, self.layout = name, layout
        spec = layout.spec
        per_word = 32 // AWQ_BITS
        shapes: dict[str, tuple[int, ...]] = {
            "qweight": (n_words(spec.in_features, spec.bits), spec.out_features),
            "qzeros": (spec.n_groups, n_words(spec.out_features, spec.bits)),
            "scales": (spec.n_groups, spec.out_features),
            "g_idx": (spec.in_features,),
            "bias": (spec.out_features,),
        }
        if layout.method == AWQ:
            shapes["qweight"] = (spec.in_features, spec.out_features // per_word)
        for suffix in (*layout.stored, *(("bias",) if bias else ())):
            kind = dtype if suffix in ("scales", "bias") else torch.int32
            empty = torch.empty(shapes[suffix], dtype=kind, device="meta")
            self.register_parameter(suffix, nn.Parameter(empty, requires_grad=False))

    @property
    def weight(self) -> Tensor:
        """What transformers looks at to learn a linear's dtype and device."""
        return self.get_parameter("scales")

    def translated(self) -> QuantizedModule:
        """Our module. Raises: CheckpointError naming the tensor where it cannot hold what is stored."""
        state = {suffix: parameter.data for suffix, parameter in self.named_parameters()}
        device = state["scales"].device
        if device.type == "meta":
            raise CheckpointError(
                f"{self.name}: is to stay on the disk, which a {self.layout.method} model cannot; give it more memory, or export "
                f"it to compressed-tensors first"
            )
        bias = {"bias": state.pop("bias")} if "bias" in state else {}
        ours = to_ours(self.name, self.layout, {suffix: tensor.cpu() for suffix, tensor in state.items()})
        ours = {suffix: tensor.to(device) for suffix, tensor in ours.items()}
        return QuantizedLinear(self.layout.spec, {**ours, **bias}).train(self.training)


class TranslatingReader(CheckpointReader):
    """A GPTQ or AWQ folder read as though its modules were stored in our tensors. Holds one module at a time."""

    infos: Translated

    def __init__(self, folder: Path | str, infos: Translated, sealed: bool = True):
        super().__init__(folder, infos, sealed)
        self._module: tuple[str, dict[str, Tensor]] = ("", {})

    @property
    def on_disk(self) -> dict[str, TensorInfo]:
        return self.infos.stored

    def _bytes(self, info: TensorInfo, begin: int, nbytes: int) -> Tensor:
        if info.offset != TRANSLATED:
            return super()._bytes(info, begin, nbytes)
        name, _, suffix = info.name.rpartition(".")
        if self._module[0] != name:
            layout = self.infos.layouts[name]
            tensors = {part: self.read_stored(f"{name}.{part}") for part in layout.stored}
            self._module = (name, to_ours(name, layout, tensors))
        tensor = self._module[1][suffix].reshape(-1)
        return tensor.view(torch.uint8)[begin : begin + nbytes]

    def read_stored(self, name: str) -> Tensor:
        """A tensor as it is on disk."""
        return self._whole(self.infos.stored[name])


def open_reader(folder: Path | str, config: dict | None = None, budget: Budget | None = None) -> CheckpointReader:
    """The tensors of a folder, those of GPTQ and AWQ modules as ours; of a stack, what fits `budget`."""
    infos = read_headers(Path(folder), budget)
    raw = read_json(Path(folder) / "config.json") if config is None else config
    with naming(folder):
        listed = translated(raw, infos)
    return (
        TranslatingReader(folder, listed) if isinstance(listed, Translated) else CheckpointReader(folder, budget=budget)
    )
