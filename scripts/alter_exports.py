"""What becomes of exports that were cut or altered: an error that names file and tensor, or a correct load; nothing else.

A tiny model is exported to every format. Each of the alterations (seeded: which file, where, how) is made on a copy,
which is then loaded whole (`compress.load`) and streamed (`compress eval`'s way). "correct" means: the same logits, bit for
bit.

    python scripts/alter_exports.py                 # 100 alterations; exit code 1 if one went unnoticed
    python scripts/alter_exports.py --n 1000 --seed 7
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package and the tests' tiny models

from compress.errors import CompressError

FORMATS = ("gptq", "awq", "compressed-tensors", "dense")
WEIGHTS = "model.safetensors"
IDS = torch.arange(2 * 16).view(2, 16)


@dataclass(frozen=True)
class Outcome:
    """`verdict`: "error", "correct" or "wrong". `where`: what was altered; `said`: the error."""

    format: str
    alteration: str
    where: str
    verdict: str
    said: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="print every outcome")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        outcomes = alter(Path(work), options.n, options.seed)
    for found in outcomes:
        if options.verbose or found.verdict == "wrong":
            print(f"{found.verdict:8} {found.format:19} {found.alteration:22} {found.where}: {found.said}")
    counts = Counter((found.alteration, found.verdict) for found in outcomes)
    for (alteration, verdict), n in sorted(counts.items()):
        print(f"{n:5} {alteration:24} {verdict}")
    wrong = sum(found.verdict == "wrong" for found in outcomes)
    print(f"{len(outcomes)} alterations, {wrong} of them unnoticed, wrong or without a name")
    return 1 if wrong else 0


def alter(work: Path, n: int, seed: int) -> list[Outcome]:
    """Make exports in `work`, alter copies of them `n` times, and see what loading says."""
    exports = {format_: make(work, format_) for format_ in FORMATS}
    expected = {format_: logits(folder) for format_, folder in exports.items()}
    picks = random.Random(seed)
    outcomes = []
    for number in range(n):
        format_ = FORMATS[number % len(FORMATS)]
        name, change = list(ALTERATIONS.items())[number // len(FORMATS) % len(ALTERATIONS)]
        folder = work / "altered"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(exports[format_], folder)
        where, must_name = change(folder, picks)
        verdict, said = judge(folder, expected[format_], must_name)
        outcomes.append(Outcome(format_, name, where, verdict, said))
    return outcomes


def make(work: Path, format_: str) -> Path:
    """A tiny Llama with biases and a tied head, 4 bits in groups of 16, exported."""
    import compress

    tiny, folders = (importlib.import_module(f"tests.{name}") for name in ("tiny_models", "checkpoint.folders"))
    if not (work / "model").exists():
        source = tiny.save_tiny("llama_gqa_tied", work / "source", tokenizer=False)
        folders.quantize_folder(source, work / "model", dtype=torch.bfloat16)
        tiny.byte_tokenizer().save_pretrained(work / "model")
    compress.export(work / "model", format_, work / format_)
    return work / format_


def logits(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the model loaded whole, in its own dtype, and streamed, in float32."""
    import compress
    from compress.checkpoint.stream import StreamedModel

    with torch.no_grad():
        whole = compress.load(folder)(IDS).logits
        streamed = StreamedModel(folder)
        hidden = streamed.embed(IDS)
        for index in range(streamed.n_blocks):
            hidden = streamed.call_block(streamed.load_block(index), index, hidden)
            streamed.unload_block(index)
        last = streamed.logits(streamed.final_norm(hidden))
        streamed.close()
    return whole, last


def judge(folder: Path, expected: tuple[torch.Tensor, torch.Tensor], must_name: tuple[str, ...]) -> tuple[str, str]:
    """An error has to be ours, in one line, and name what was altered."""
    try:
        found = logits(folder)
    except CompressError as error:
        said = str(error)
        named = all(name in said for name in must_name) and "\n" not in said
        return ("error" if named else "wrong"), said
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {error}"
    same = all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))
    return ("correct" if same else "wrong"), "loads"


# ---- the alterations: each changes a folder and says where, and what an error has to name

Change = Callable[[Path, random.Random], tuple[str, tuple[str, ...]]]


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(file: Path, header: dict[str, Any], data: bytes) -> None:
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def tensors_of(header: dict[str, Any]) -> list[str]:
    return sorted(name for name in header if name != "__metadata__")


def cut(folder: Path, picks: random.Random) -> tuple[str, tuple[str, ...]]:
    file = picks.choice(
        sorted(path for path in folder.iterdir() if path.name in (WEIGHTS, "config.json", "compress_export.json"))
    )
    data = file.read_bytes()
    keep = picks.randrange(len(data))
    file.write_bytes(data[:keep])
    return f"{file.name} cut to {keep} bytes", (file.name,)


def flip_data(folder: Path, picks: random.Random) -> tuple[str, tuple[str, ...]]:
    header, data = header_of(folder / WEIGHTS)
    changed = bytearray(data)
    place = picks.randrange(len(changed))
    changed[place] ^= 1 << picks.randrange(8)
    write(folder / WEIGHTS, header, bytes(changed))
    owner = next(n for n in tensors_of(header) if header[n]["data_offsets"][0] <= place < header[n]["data_offsets"][1])
    return f"a bit of {owner}", (WEIGHTS, owner)


def zero_tensor(folder: Path, picks: random.Random) -> tuple[str, tuple[str, ...]]:
    header, data = header_of(folder / WEIGHTS)
    name = picks.choice(tensors_of(header))
    begin, end = header[name]["data_offsets"]
    filled = b"\x01" * (end - begin)
    write(folder / WEIGHTS, header, data[:begin] + filled + data[end:])
    return f"{name} overwritten", (WEIGHTS, name)


def flip_header(folder: Path, picks: random.Random) -> tuple[str, tuple[str, ...]]:
    file = folder / WEIGHTS
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    place = picks.randrange(8 + length)
    data[place] ^= 1 << picks.randrange(7)
    file.write_bytes(bytes(data))
    return f"a bit of the header, at {place}", ()


def swap_tensors(folder: Path, picks: random.Random) -> tuple[str, tuple[str, ...]]:
    """Two tensors of one dtype and shape change places, as in a header that was put together wrongly."""
    header, data = header_of(folder / WEIGHTS)
    pairs = [
        (a, b)
        for a in tensors_of(header)
        for b in tensors_of(header)
        if a < b and all(header[a][key] == header[b][key] for key in ("dtype", "shape")) and differ(header, data, a, b)
    ]
    first, second = picks.choice(pairs)
    header[first], header[second] = header[second], header[first]
    write(folder / WEIGHTS, header, data)
    return f"{first} and {second} exchanged", (WEIGHTS,)


def differ(header: dict[str, Any], data: bytes, first: str, second: str) -> bool:
    left, right = (data[slice(*header[name]["data_offsets"])] for name in (first, second))
    return left != right


def rename_tensor(folder: Path, picks: random.Random) -> tuple[str, tuple[str, ...]]:
    header, data = header_of(folder / WEIGHTS)
    name = picks.choice(tensors_of(header))
    header[picks.choice((f"{name}s", f"{name}.old", f"old.{name}"))] = header.pop(name)
    write(folder / WEIGHTS, header, data)
    return f"{name} renamed", (name,)


def drop_tensor(folder: Path, picks: random.Random) -> tuple[str, tuple[str, ...]]:
    header, data = header_of(folder / WEIGHTS)
    name = picks.choice(tensors_of(header))
    begin, end = header.pop(name)["data_offsets"]
    for other in tensors_of(header):
        if header[other]["data_offsets"][0] >= end:
            header[other]["data_offsets"] = [offset - (end - begin) for offset in header[other]["data_offsets"]]
    write(folder / WEIGHTS, header, data[:begin] + data[end:])
    return f"{name} left out", (name,)


def retype_tensor(folder: Path, picks: random.Random) -> tuple[str, tuple[str, ...]]:
    """The same bytes under a dtype of the same width, or a transposed shape."""
    header, data = header_of(folder / WEIGHTS)
    name = picks.choice(tensors_of(header))
    others = {"F16": "BF16", "BF16": "F16", "I32": "F32", "F32": "I32", "I64": "F64"}
    if (
        len(header[name]["shape"]) == 2
        and picks.random() < 0.5
        and header[name]["shape"][0] != header[name]["shape"][1]
    ):
        header[name]["shape"].reverse()
    else:
        header[name]["dtype"] = others[header[name]["dtype"]]
    write(folder / WEIGHTS, header, data)
    return f"{name} is {header[name]['dtype']} {header[name]['shape']}", (WEIGHTS, name)


def append(folder: Path, picks: random.Random) -> tuple[str, tuple[str, ...]]:
    with open(folder / WEIGHTS, "ab") as stream:
        stream.write(picks.randbytes(picks.randrange(1, 100)))
    return "bytes appended", (WEIGHTS,)


def delete(folder: Path, picks: random.Random) -> tuple[str, tuple[str, ...]]:
    """Without README.md the model is what it was; without the checksums it loads unchecked, and nothing else is altered."""
    file = picks.choice(sorted(folder.iterdir()))
    file.unlink()
    return f"{file.name} deleted", (file.name.split(".")[0],)


def change_config(folder: Path, picks: random.Random) -> tuple[str, tuple[str, ...]]:
    config = json.loads((folder / "config.json").read_text())
    quantization = config.get("quantization_config")
    changes: list[tuple[str, Callable[[], object]]] = [
        ("rope_theta", lambda: config["rope_parameters"].update(rope_theta=1000.0)),
        ("rms_norm_eps", lambda: config.update(rms_norm_eps=1e-2)),
        ("num_hidden_layers", lambda: config.update(num_hidden_layers=2)),
        ("hidden_act", lambda: config.update(hidden_act="gelu")),
        ("tie_word_embeddings", lambda: config.update(tie_word_embeddings=False)),
    ]
    if quantization is not None:
        changes += [
            ("no quantization_config", lambda: config.pop("quantization_config")),
            ("group_size", lambda: quantization.update(group_size=32)),
            ("sym", lambda: quantization.update(sym=False)),
            ("checkpoint_format", lambda: quantization.update(checkpoint_format="gptq_v2")),
            ("quant_method", lambda: quantization.update(quant_method="gptq")),
        ]
    name, change = picks.choice(changes)
    change()
    (folder / "config.json").write_text(json.dumps(config))
    return f"config.json: {name}", ("config.json",)


def flip_text(folder: Path, picks: random.Random) -> tuple[str, tuple[str, ...]]:
    """A byte of a JSON file."""
    names = ("config.json", "compress_export.json", "tokenizer.json", "quantize_config.json")
    file = picks.choice(sorted(path for path in folder.iterdir() if path.name in names))
    data = bytearray(file.read_bytes())
    place = picks.randrange(len(data))
    data[place] ^= 1 << picks.randrange(7)
    file.write_bytes(bytes(data))
    return f"a bit of {file.name}, at {place}", ()


ALTERATIONS: dict[str, Change] = {
    "file cut": cut,
    "bit of weights": flip_data,
    "tensor overwritten": zero_tensor,
    "bit of header": flip_header,
    "tensors exchanged": swap_tensors,
    "tensor renamed": rename_tensor,
    "tensor left out": drop_tensor,
    "other dtype or shape": retype_tensor,
    "bytes appended": append,
    "file deleted": delete,
    "config changed": change_config,
    "bit of a JSON file": flip_text,
}

if __name__ == "__main__":
    sys.exit(main())
