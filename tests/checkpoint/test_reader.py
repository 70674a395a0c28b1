"""Headers are believed only where they can be true; tensors are read as they lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from compress.checkpoint.headers import MAX_HEADER_BYTES, parse_header, read_header, read_headers, read_json
from compress.checkpoint.reader import SAFETENSORS_DTYPES, TORCH_DTYPES, CheckpointReader
from compress.errors import CheckpointError
from compress.modules.spec import DTYPE_BYTES

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F4", ""]) | JSON,
        "shape": st.lists(st.integers(-1, 9) | JSON, max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 99) | JSON, min_size=1, max_size=3) | JSON,
    },
)
SMALL = {"a": torch.arange(6.0).view(2, 3), "b.weight": torch.ones(4, dtype=torch.bfloat16), "é": torch.tensor(7)}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reader") / "model.safetensors"
    save_file(SMALL, path, metadata={"format": "pt"})
    return path


def as_file(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def parse_or_refuse(data: bytes) -> bool:
    """Whether a file of these bytes is accepted. Nothing but CheckpointError, in one line, may come of it."""
    try:
        parse_header(data, Path("x.safetensors"), len(data))
        return True
    except CheckpointError as error:
        message = str(error)
    assert "x.safetensors" in message
    assert "\n" not in message
    assert len(message) < 1200
    return False


def library_accepts(data: bytes, folder: Path) -> bool:
    path = folder / "mutated.safetensors"
    path.write_bytes(data)
    try:
        with safe_open(path, "pt"):
            return True
    except (SafetensorError, ValueError, OSError):
        return False


def test_tables_of_dtypes_agree() -> None:
    assert DTYPE_BYTES.keys() == TORCH_DTYPES.keys()
    assert {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()} == DTYPE_BYTES
    assert {SAFETENSORS_DTYPES[dtype]: dtype for dtype in SAFETENSORS_DTYPES} == TORCH_DTYPES


def test_reads_what_the_library_wrote(file: Path) -> None:
    with CheckpointReader(file.parent) as reader:
        assert set(reader.infos) == set(SMALL)
        for name, tensor in SMALL.items():
            torch.testing.assert_close(reader.read(name), tensor, rtol=0, atol=0)
            assert reader.info(name).nbytes == tensor.nbytes
            assert b"".join(reader.chunks(name)) == tensor.view(-1).view(torch.uint8).numpy().tobytes()
        assert reader.read("a", torch.float16).dtype == torch.float16
        assert reader.read("é", torch.float16).dtype == torch.int64  # casts are for floats


def test_a_missing_tensor_is_named(file: Path) -> None:
    with CheckpointReader(file.parent) as reader, pytest.raises(CheckpointError, match="tensor ghost is missing"):
        reader.read("ghost")


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_changed_bytes_are_read_or_refused(file: Path, data: st.DataObject) -> None:
    """… and what is accepted is what the safetensors library accepts."""
    mutated = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        mutated[at] = data.draw(st.integers(0, 255))
    kept = bytes(mutated[: data.draw(st.just(len(mutated)) | st.integers(0, len(mutated)))])
    if len(kept) >= 8 and parse_or_refuse(kept):
        assert library_accepts(kept, file.parent) or _differs_by_taste(kept)


def _differs_by_taste(data: bytes) -> bool:
    """What we read and the library refuses: metadata that hold something else than text, a key that is there twice,
    and fields that it does not know."""
    length = int.from_bytes(data[:8], "little")
    pairs: list[str] = []
    content = json.loads(
        data[8 : 8 + length], object_pairs_hook=lambda found: pairs.extend(k for k, _ in found) or dict(found)
    )
    twice = len([p for p in pairs if pairs.count(p) > 1 and p not in ("dtype", "shape", "data_offsets")]) > 0
    known = all(set(e) == {"dtype", "shape", "data_offsets"} for n, e in content.items() if n != "__metadata__")
    return twice or not known or content.get("__metadata__", {"format": "pt"}) != {"format": "pt"}


@given(header=st.dictionaries(st.text(max_size=6), ENTRY, max_size=3), surplus=st.integers(0, 64))
@settings(max_examples=200, deadline=None)
def test_any_header_is_read_or_refused(header: dict[str, object], surplus: int) -> None:
    parse_or_refuse(as_file(json.dumps(header).encode(), bytes(surplus)))


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "garbage.safetensors"
    for data in (content, as_file(content)):
        path.write_bytes(data)
        message = ""
        try:
            read_header(path)
        except CheckpointError as error:
            message = str(error)
        assert "\n" not in message


@pytest.mark.parametrize("length", [2**63 + 1, 2**64 - 1, MAX_HEADER_BYTES + 1, 10**6])
def test_a_header_longer_than_the_file(length: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        read_header(path)


def entry(begin: int, end: int) -> dict[str, object]:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, "tensor b overlaps"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, "tensor b overlaps"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, "tensor b does not follow"),
        ({"a": entry(4, 12)}, "tensor a does not follow"),
        ({"a": entry(0, 8)}, "4 bytes follow its last tensor"),
        ({"a": entry(0, 13)}, "truncated"),
        ({}, "12 bytes follow"),
    ],
)
def test_tensors_lie_one_behind_the_other(entries: dict[str, object], says: str) -> None:
    data = as_file(json.dumps(entries).encode(), bytes(12))
    with pytest.raises(CheckpointError, match=says):
        parse_header(data, Path("x"), len(data))


@given(
    n_rows=st.integers(1, 40),
    width=st.integers(1, 5),
    picks=st.sets(st.integers(0, 39)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    cast=st.sampled_from([None, torch.float32]),
)
@settings(max_examples=60, deadline=None)
def test_rows_are_those_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory,
    n_rows: int,
    width: int,
    picks: set[int],
    dtype: torch.dtype,
    cast: torch.dtype | None,
) -> None:
    folder = tmp_path_factory.getbasetemp() / "rows"
    folder.mkdir(exist_ok=True)
    table = torch.randn(n_rows, width).to(dtype)
    save_file({"other": torch.ones(3), "table": table}, folder / "model.safetensors")
    rows = torch.tensor(sorted(pick for pick in picks if pick < n_rows), dtype=torch.long)
    with CheckpointReader(folder) as reader:
        expected = table[rows] if cast is None else table[rows].to(cast)
        torch.testing.assert_close(reader.read_rows("table", rows, cast), expected, rtol=0, atol=0)


@pytest.mark.parametrize("row", [-1, 2, 10**9])
def test_a_row_that_is_not_there(row: int, file: Path) -> None:
    with CheckpointReader(file.parent) as reader, pytest.raises(CheckpointError, match="which has 2 rows"):
        reader.read_rows("a", torch.tensor([row]))


def test_a_file_that_is_cut_while_it_is_read(file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model.safetensors"
    copy.write_bytes(file.read_bytes())
    with CheckpointReader(tmp_path) as reader:
        copy.write_bytes(copy.read_bytes()[:-30])
        with pytest.raises(CheckpointError, match="the file was cut"):
            [reader.read(name) for name in reader.infos]


def test_a_tensor_in_two_shards(file: Path, tmp_path: Path) -> None:
    for name in ("model-1.safetensors", "model-2.safetensors"):
        (tmp_path / name).write_bytes(file.read_bytes())
    weight_map = {"a": "model-1.safetensors", "é": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors: tensor .* is also in model-1\.safetensors"):
        read_headers(tmp_path)


def test_an_index_reaches_no_other_folder(file: Path, tmp_path: Path) -> None:
    index = {"weight_map": {"a": f"../{file.parent.name}/model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="missing"):
        read_headers(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"\xff\xfe", b"{" * 10**5, b'{"a": ' * 10**5])
def test_json_that_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.json: ") as caught:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(caught.value)
