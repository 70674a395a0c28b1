"""Write a Llama of random bitstack blocks, of any shape and size, in little memory: a stack to resize and to time.

Signs are random bits; magnitudes are of rank `--rank`, positive, and fall by DECAY from block to block, so that weights have
about the size of an initialised Llama's. Blocks lie in the order of their levels. Tokenizer and what is not stacked are those of
scripts/random_llama.py; widths are multiples of 8.

    python scripts/random_stack.py OUT --blocks 16 --stack-blocks 4
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package beside this script, installed or not

from random_llama import STD, Shape, _random, _write_tokenizer, add_shape_options, shape_of

from compress.checkpoint.description import OWN_INDEX, guard, own_config
from compress.checkpoint.headers import read_header
from compress.checkpoint.stack import STACK, Entry, StackFile, stack_name, table_json
from compress.checkpoint.writer import Stored, from_tensor, write_json, write_safetensors
from compress.models.structure import Structure
from compress.modules.bitstack_spec import BitStackSpec

DECAY = 0.6  # of what is left, per block
FILE_BYTES = 128 * 2**20


def random_stack(
    folder: Path,
    shape: Shape,
    *,
    rank: int = 16,
    blocks: int = 4,
    dtype: str = "bfloat16",
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Write the model, its stack and its tokenizer into `folder`.

    Args:
        blocks: of each layer.
        file_bytes: of a file of the stack, at most, where an entry is not larger.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = shape.tensors()
    specs = {
        name.removesuffix(".weight"): BitStackSpec(size[1], size[0], rank, blocks)
        for name, size in tensors.items()
        if name.endswith("_proj.weight")
    }
    kept = {name: size for name, size in tensors.items() if name.removesuffix(".weight") not in specs}
    base = {name: _random(name, size, dtype, 0) for name, size in kept.items()}
    for name, spec in specs.items():
        base.update({key: from_tensor(tensor) for key, tensor in _block(name, spec, 0)})
    file = "compress-00001-of-00001.safetensors"
    write_safetensors(folder / file, base)
    write_json(folder / OWN_INDEX, {"metadata": {}, "weight_map": dict.fromkeys(base, file)})
    _write_stack(folder, specs, file_bytes)
    quantization = own_config(specs, Structure())
    write_json(
        folder / "config.json",
        {**shape.config(dtype), "quantization_config": quantization, "transformers_weights": guard()},
    )
    _write_tokenizer(folder, shape)
    return folder


def _block(name: str, spec: BitStackSpec, level: int) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/{level}".encode()))
    size = (STD * DECAY**level / spec.rank) ** 0.5
    for suffix, (dtype, shape) in spec.level(level, "F16").items():
        if dtype == "U8":
            words = torch.empty(-(-prod(shape) // 8), dtype=torch.int64).random_(generator=generator)
            signs = words.view(torch.uint8)  # the highest bit of random words is 0: a plane for one of 64 columns
            tensor = signs[: prod(shape)].view(shape)
        else:
            tensor = torch.rand(shape, generator=generator).add_(0.5).mul_(size).half()
        yield f"{name}.{suffix}", tensor


def _write_stack(folder: Path, specs: dict[str, BitStackSpec], file_bytes: int) -> None:
    order = [(name, level) for level in range(1, max(s.blocks for s in specs.values())) for name in specs]
    files: list[list[tuple[str, int]]] = [[]]
    filled = 0
    for name, level in order:
        nbytes = specs[name].block_bytes
        if files[-1] and filled + nbytes > file_bytes:
            files.append([])
            filled = 0
        files[-1].append((name, level))
        filled += nbytes
    table: list[tuple[StackFile, list[Entry]]] = []
    for number, places in enumerate(files):
        stored: dict[str, Stored] = {}
        sums = []
        for name, level in places:
            parts = {key: from_tensor(tensor) for key, tensor in _block(name, specs[name], level)}
            crc = 0
            for part in parts.values():
                for piece in part.pieces():
                    crc = zlib.crc32(piece, crc)
            sums.append(crc)
            stored.update(parts)
        file = stack_name(number, len(files))
        nbytes = write_safetensors(folder / file, stored, in_order=True)
        header = read_header(folder / file)
        entries = []
        for (name, level), crc in zip(places, sums, strict=True):
            first = f"{name}.{next(iter(specs[name].level(level, 'F16')))}"
            entries.append(Entry(name, level, number, header[first].offset, specs[name].block_bytes, crc))
        table.append((StackFile(file, nbytes), entries))
    write_json(folder / STACK, table_json(list(specs), table, "levels"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write")
    add_shape_options(parser, Shape())
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--stack-blocks", type=int, default=4, help="sign planes of each layer  [default: 4]")
    parser.add_argument("--file-mib", type=int, default=FILE_BYTES // 2**20, help="of a file of the stack")
    options = parser.parse_args()
    random_stack(
        options.out,
        shape_of(options),
        rank=options.rank,
        blocks=options.stack_blocks,
        file_bytes=options.file_mib * 2**20,
    )
    print(f"{options.out}: {sum(file.stat().st_size for file in options.out.iterdir()) / 2**20:,.1f} MiB")


if __name__ == "__main__":
    main()
