"""Brings a loaded model into the layout of the native kernels: product by product, so that no more than one is there twice.

Linears of one site (models/architecture.py) that are quantized alike become one product; see modules/packed.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from torch import nn

from compress.kernels import native
from compress.kernels.choice import Choice, chosen
from compress.models.families import module_name
from compress.modules.corrected import CorrectedLinear
from compress.modules.packed import alike, pack_rows
from compress.modules.quantized import QuantizedLinear

if TYPE_CHECKING:
    from compress.models.architecture import Architecture


def pack_model(
    model: nn.Module,
    choice: Choice,
    architecture: Architecture | None = None,
    cut: str = "",
    progress: Callable[[list[list[QuantizedLinear]]], Iterable[list[QuantizedLinear]]] = iter,
) -> int:
    """Pack the quantized linears that a native kernel can run where they are; plain tensors are let go as it proceeds.

    Args:
        architecture: says which linears share an input; None: each is a product of its own.
        cut: what names of the whole model begin with, where `model` is a part of it.
        progress: goes through the products, and may show how far it is.

    Returns: the number of products.
    """
    if not choice.packs:
        return 0
    products = products_of(model, architecture, cut)
    for members in progress(products) if products else ():
        packed = pack_rows(members, choice.activations)
        for place, member in enumerate(members):
            member.move_into(packed, place)
    if products:
        _give_back()
    return len(products)


def _give_back() -> None:
    """Let the C library return to the system what the plain tensors took: it keeps freed memory for the next to ask."""
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def pack_loaded(model: nn.Module, architecture: Architecture | None, cut: str) -> None:
    """Pack a model that has just been loaded, as `choosing` or the defaults say, and show how far it is."""
    from transformers.utils import logging

    pack_model(model, chosen(), architecture, cut, lambda products: logging.tqdm(products, desc="Packing weights"))


def products_of(model: nn.Module, architecture: Architecture | None, cut: str = "") -> list[list[QuantizedLinear]]:
    """What can be packed, in the order of the model; together what shares an input and is quantized alike.

    Factors of a correction are left as they are: the operation that takes the packed base takes them in floats.
    """
    corrected = [m for m in model.modules() if isinstance(m, CorrectedLinear) and m.runs_as_one()]
    beside = {id(factor) for m in corrected for factor in (m.right, m.left)}
    linears = {
        n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear) and m.packable and id(m) not in beside
    }
    companions: dict[str, list[str]] = {}
    if architecture is not None:
        for site in architecture.all_sites():
            names = [module_name(architecture, name).removeprefix(cut) for name in site.linears]
            companions.update(dict.fromkeys(names, names))
    products: list[list[QuantizedLinear]] = []
    done: set[int] = set()
    for name, linear in linears.items():
        if id(linear) not in done:
            others = (linears[other] for other in companions.get(name, [name]) if other in linears)
            members = [other for other in others if id(other) not in done and alike(linear, other)]
            products.append(members)
            done.update(id(member) for member in members)
    return products


def packed_linears(model: nn.Module) -> list[QuantizedLinear]:
    """The linears that run on a native kernel."""
    return [m for m in model.modules() if isinstance(m, QuantizedLinear) and m.packed is not None]


def packed_bytes(model: nn.Module) -> int:
    """Bytes of the buffers of native kernels, which are no parameters."""
    return sum({id(m.packed): m.packed.weight.nbytes for m in packed_linears(model) if m.packed is not None}.values())


def arithmetic(model: nn.Module) -> dict[str, object]:
    """What runs the quantized linears of a loaded model, for reports.

    Returns: "kernels" "reference", the instruction set of the native ones, or "cuda", "activations" "float" or "int8" (a GPU
        rounds none), "products" how many there are of the native ones, for "linears" linears.
    """
    linears = packed_linears(model)
    products = {id(m.packed): m.packed for m in linears if m.packed is not None}
    on_gpu = [packed.weight.buffer.is_cuda for packed in products.values()]
    ways = sorted(
        {"float" if gpu else packed.activations for gpu, packed in zip(on_gpu, products.values(), strict=True)}
    )
    runs = sorted({"cuda" if gpu else str(native.current_isa()) for gpu in on_gpu})
    return {
        "kernels": " and ".join(runs) or "reference",
        "activations": " and ".join(ways) or "float",
        "products": len(products),
        "linears": len(linears),
    }
