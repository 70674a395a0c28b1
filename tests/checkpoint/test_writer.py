"""Files appear whole or not at all, hold what they were given, and are the same for the same tensors."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compress.checkpoint import writer
from compress.checkpoint.headers import read_header
from compress.checkpoint.reader import SAFETENSORS_DTYPES, TORCH_DTYPES, CheckpointReader
from compress.checkpoint.writer import (
    finite_chunks,
    from_source,
    from_tensor,
    write_json,
    write_safetensors,
    write_text,
)
from compress.errors import CheckpointError, NumericsError

NAMES = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=12).filter(
    lambda n: n != "__metadata__"
)
SHAPES = st.lists(st.integers(0, 5), max_size=3)
FLOATS = {"F64", "F32", "F16", "BF16"}


def random_tensor(dtype: str, shape: list[int], seed: int) -> torch.Tensor:
    """Random bits; a random choice of 0 and 1 for booleans, finite values for floats."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == "BOOL":
        return torch.randint(2, shape, generator=generator).bool()
    if dtype in FLOATS:
        return torch.randn(shape, generator=generator).to(TORCH_DTYPES[dtype])
    nbytes = TORCH_DTYPES[dtype].itemsize
    raw = torch.randint(256, [*shape, nbytes], dtype=torch.uint8, generator=generator)
    return raw.view(TORCH_DTYPES[dtype]).reshape(shape)


def bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return tensor.dtype, tuple(tensor.shape), raw


TENSORS = st.dictionaries(
    NAMES, st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), SHAPES, st.integers(0, 99)), max_size=5
)


@given(described=TENSORS)
@settings(max_examples=120, deadline=None)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, described: dict[str, Any]) -> None:
    """By us and by the safetensors library."""
    path = tmp_path_factory.getbasetemp() / "written.safetensors"
    tensors = {name: random_tensor(*fields) for name, fields in described.items()}
    nbytes = write_safetensors(path, {name: from_tensor(t) for name, t in tensors.items()})
    assert path.stat().st_size == nbytes
    infos = read_header(path)
    assert {n: (i.dtype, i.shape) for n, i in infos.items()} == {
        n: (SAFETENSORS_DTYPES[t.dtype], tuple(t.shape)) for n, t in tensors.items()
    }
    with CheckpointReader(path.parent, infos) as reader:
        assert {n: bits(reader.read(n)) for n in infos} == {n: bits(t) for n, t in tensors.items()}
    assert {n: bits(t) for n, t in load_file(path).items()} == {n: bits(t) for n, t in tensors.items()}


@given(described=TENSORS, order=st.randoms())
@settings(max_examples=30, deadline=None)
def test_same_tensors_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, described: dict[str, Any], order: Any
) -> None:
    folder = tmp_path_factory.getbasetemp()
    tensors = {name: from_tensor(random_tensor(*fields)) for name, fields in described.items()}
    shuffled = list(tensors)
    order.shuffle(shuffled)
    write_safetensors(folder / "one", tensors)
    write_safetensors(folder / "two", {name: tensors[name] for name in shuffled})
    assert (folder / "one").read_bytes() == (folder / "two").read_bytes()


def test_copied_in_pieces_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a": torch.randn(37, 11), "b": torch.randn(50).bfloat16(), "c": torch.arange(9), "d": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    monkeypatch.setattr("compress.checkpoint.reader.COPY_CHUNK", 64)
    monkeypatch.setattr("compress.checkpoint.writer.COPY_CHUNK", 32)
    with CheckpointReader(tmp_path) as reader:
        write_safetensors(tmp_path / "copy", {name: from_source(reader, name) for name in tensors})
        write_safetensors(tmp_path / "cast", {name: from_source(reader, name, torch.float16) for name in tensors})
    assert {n: bits(t) for n, t in load_file(tmp_path / "copy").items()} == {n: bits(t) for n, t in tensors.items()}
    cast = {n: t.to(torch.float16) if t.is_floating_point() else t for n, t in tensors.items()}
    assert {n: bits(t) for n, t in load_file(tmp_path / "cast").items()} == {n: bits(t) for n, t in cast.items()}


@pytest.mark.parametrize("dtype", sorted(FLOATS))
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 41, 99])
def test_what_is_not_finite_is_not_copied(
    dtype: str, value: float, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.checkpoint.reader.COPY_CHUNK", 64)
    tensor = torch.zeros(100, dtype=TORCH_DTYPES[dtype])
    tensor[at] = value
    save_file({"fine": torch.ones(4), "w": tensor}, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        assert len(list(finite_chunks(reader, "fine"))) == 1
        with pytest.raises(
            CheckpointError, match=r"model\.safetensors: tensor w holds NaN or infinity; .* fetch it again"
        ):
            write_safetensors(tmp_path / "out", {"w": from_source(reader, "w")})
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model.safetensors"]


def test_a_cast_that_overflows(tmp_path: Path) -> None:
    save_file({"w": torch.tensor([1e30])}, tmp_path / "model.safetensors")
    with (
        CheckpointReader(tmp_path) as reader,
        pytest.raises(NumericsError, match=r"beyond the range of float16; use --set"),
    ):
        write_safetensors(tmp_path / "out", {"w": from_source(reader, "w", torch.float16)})


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "disk is full; free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EROFS, "read-only; choose another"),
        (errno.EACCES, "no permission .* --out"),
        (errno.EIO, "Input/output error; mend it"),
    ],
)
def test_a_failed_write_leaves_the_old_file(
    call: str, number: int, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "file", "old")

    def fail(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(writer.os, call, fail)
    with pytest.raises(CheckpointError, match=f"file: cannot be written: .*{remedy}") as caught:
        write_json(tmp_path / "file", {"new": 1})
    assert "\n" not in str(caught.value)
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == {"file": "old"}


def test_a_file_size_limit(tmp_path: Path) -> None:
    """A limit of the shell (ulimit -f) is met in the middle of a write."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        with pytest.raises(CheckpointError, match="ulimit -f"):
            write_safetensors(tmp_path / "big", {"w": from_tensor(torch.ones(5000))})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_in_the_middle_of_a_file(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    (tmp_path / "file.partial").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match="the disk is full"):
        write_safetensors(tmp_path / "file", {"w": from_tensor(torch.ones(5000))})
    assert not list(tmp_path.iterdir())
