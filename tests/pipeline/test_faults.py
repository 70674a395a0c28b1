"""Whatever is wrong, a run ends with one line that names the thing and the remedy, and leaves nothing that looks whole.

A new fault is one entry of FAULTS: what to do to a workspace in which everything is right, and what the line must say.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from compress.checkpoint.headers import read_headers
from compress.errors import CheckpointError, CompressError, NumericsError, RecipeError
from compress.pipeline.journal import folder_lock
from compress.pipeline.run import Machine, run
from compress.recipe import Recipe
from compress.report import PAGE
from tests.pipeline.test_resume import REPORT, WORDS, Phases, assert_no_model, contents
from tests.tiny_models import save_tiny

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LONGEST_LINE = 700
CONFIG = "config.json"
RTN = [{"rtn": {"bits": 4, "group_size": 32}}]
GPTQ = [{"gptq": {"bits": 4, "group_size": 32}}]


@dataclass
class Workspace:
    """A model, a text and a recipe with which everything is right, until a fault is put in."""

    folder: Path
    patch: pytest.MonkeyPatch
    recipe: dict[str, Any]
    out: Path
    machine: Machine = field(default_factory=Machine)
    overwrite: bool = False

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def text(self) -> Path:
        return self.folder / "text.txt"

    @property
    def shard(self) -> Path:
        return self.model / "model.safetensors"

    def run(self) -> Any:
        return run(Recipe.from_dict(self.recipe), self.out, machine=self.machine, overwrite=self.overwrite)

    def config(self, **changes: Any) -> None:
        file = self.model / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    def tensors(self, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        tensors = load_file(self.shard)
        change(tensors)
        save_file(tensors, self.shard, metadata={"format": "pt"})

    def header(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Rewrite the header, and leave the data as they are."""
        data = self.shard.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        encoded = json.dumps(header).encode()
        self.shard.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + length :])

    def sharded(self) -> Path:
        """Split the model into shards with an index, which is returned."""
        shutil.rmtree(self.model)
        save_tiny("llama", self.model, max_shard_size="200KB")
        return self.model / "model.safetensors.index.json"

    def index(self, change: Callable[[dict[str, Any]], Any]) -> None:
        index = self.sharded()
        content = json.loads(index.read_text())
        change(content)
        index.write_text(json.dumps(content))

    def interrupted(self, recipe: dict[str, Any] | None = None) -> None:
        """Leave an unfinished run behind."""
        with pytest.raises(KeyboardInterrupt):
            run(Recipe.from_dict(recipe or self.recipe), self.out, progress=Phases("compress", 2))

    def fails(self, function: str, number: int, at: str = "", nth: int = 1) -> None:
        """Let the `nth` call of a function of `os` on a file whose name contains `at`, and all later ones, fail."""
        original, count = getattr(os, function), 0

        def failing(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            name = os.readlink(f"/proc/self/fd/{args[0]}") if isinstance(args[0], int) else str(args[0])
            count += at in name
            if at in name and count >= nth:
                raise OSError(number, os.strerror(number), name)
            return original(*args, **kwargs)

        self.patch.setattr(os, function, failing)


@dataclass(frozen=True)
class Fault:
    """`put` spoils the workspace; the run must end with `error`, in one line that holds all of `says`."""

    name: str
    error: type[CompressError]
    says: tuple[str, ...]
    put: Callable[[Workspace], Any]
    keeps: bool = False  # out is there before, and must be left as it is

    def __str__(self) -> str:
        return self.name


def poke(name: str, value: float) -> Callable[[Workspace], None]:
    return lambda w: w.tensors(lambda t: t[name].view(-1)[7:8].fill_(value))


def settings(**changes: Any) -> Callable[[Workspace], None]:
    """Change fields of the recipe: calibration__samples=0."""

    def put(w: Workspace) -> None:
        for path, value in changes.items():
            at, *rest = path.split("__")
            w.recipe[at] = {**w.recipe[at], rest[0]: value} if rest else value

    return put


def quantized_by(method: str) -> Callable[[Workspace], None]:
    return lambda w: w.config(quantization_config={"quant_method": method, "bits": 4, "group_size": 128})


def remove(*names: str) -> Callable[[Workspace], None]:
    return lambda w: [(w.model / name).unlink() for name in names]


def replace(name: str, content: str) -> Callable[[Workspace], None]:
    return lambda w: (w.model / name).write_text(content)


def only(name: str) -> Callable[[Workspace], None]:
    """The folder holds weights of another kind."""

    def put(w: Workspace) -> None:
        w.shard.unlink()
        (w.model / name).write_bytes(b"\x80\x02}q\x00.")

    return put


def data_file(name: str, content: str) -> Callable[[Workspace], None]:
    def put(w: Workspace) -> None:
        (w.folder / name).write_text(content)
        settings(calibration__data=str(w.folder / name))(w)

    return put


def vocabulary(size: int) -> Callable[[Workspace], None]:
    """Give the tokenizer ids beyond the model's table."""

    def put(w: Workspace) -> None:
        file = w.model / "tokenizer.json"
        content = json.loads(file.read_text())
        content["model"]["vocab"].update({f"word{i}": i for i in range(300, size)})
        file.write_text(json.dumps(content))

    return put


def added_token(w: Workspace) -> None:
    """A token that the text holds, with an id that the table does not."""
    file = w.model / "tokenizer.json"
    content = json.loads(file.read_text())
    like = content["added_tokens"][0]
    content["added_tokens"] += [{**like, "id": 259 + i, "content": f"<{i}>"} for i in range(40)]
    content["added_tokens"].append({**like, "id": 299, "content": "bridge"})
    file.write_text(json.dumps(content))


def out_is(path: str) -> Callable[[Workspace], None]:
    def put(w: Workspace) -> None:
        w.out = w.folder / path

    return put


def foreign(w: Workspace) -> None:
    w.out.mkdir()
    (w.out / "thesis.tex").write_text("years of work")


def other_recipe(w: Workspace) -> None:
    w.interrupted()
    w.recipe["steps"] = [{"rtn": {"bits": 3, "group_size": 32}}]


def finished(w: Workspace, steps: list[dict[str, Any]] | None = None) -> None:
    w.run()
    w.recipe["steps"] = steps or w.recipe["steps"]


def finished_and(change: Callable[[Path], Any]) -> Callable[[Workspace], None]:
    def put(w: Workspace) -> None:
        w.run()
        change(w.out)

    return put


def result_into_itself(w: Workspace) -> None:
    finished(w)
    w.recipe["model"] = str(w.out)
    w.overwrite = True


def locked(w: Workspace) -> None:
    w.interrupted()
    lock = folder_lock(w.out)
    lock.__enter__()
    w.patch.setattr(w, "lock", lock, raising=False)  # held until the test is over


def offline(w: Workspace) -> None:
    w.recipe["model"] = "nobody/nothing"


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Workspace], None]:
    return lambda w: w.header(change)


def config(**changes: Any) -> Callable[[Workspace], None]:
    return lambda w: w.config(**changes)


def index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Workspace], None]:
    return lambda w: w.index(change)


def mapped(files: dict[str, str]) -> Callable[[Workspace], None]:
    return lambda w: w.index(lambda i: i["weight_map"].update(files))


def without(tensor: str) -> Callable[[Workspace], None]:
    return lambda w: w.tensors(lambda t: t.pop(tensor))


def fails(function: str, number: int, at: str = "", nth: int = 1) -> Callable[[Workspace], None]:
    return lambda w: w.fails(function, number, at, nth)


def steps(**keys: Any) -> Callable[[Workspace], None]:
    return settings(steps=[{**RTN[0], **keys}])


def beyond_float16(w: Workspace) -> None:
    poke(EMBEDDING, 1e30)(w)
    settings(model={"path": str(w.model), "dtype": "float16"})(w)


def no_room(w: Workspace) -> None:
    w.patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))


def no_room_beside(w: Workspace) -> None:
    """Enough for the result, of 1 MB, and not for the activations, none of which may lie in memory."""
    spilled(w)
    w.recipe["calibration"] = {**w.recipe["calibration"], "samples": 10_000, "length": 64}
    w.patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 20 * 2**20))


def cut_shard(out: Path) -> None:
    os.truncate(next(out.glob("*00002-of*")), 9)


def header_of(content: bytes) -> Callable[[Workspace], None]:
    return lambda w: w.shard.write_bytes(len(content).to_bytes(8, "little") + content + bytes(64))


def spilled(w: Workspace) -> None:
    w.recipe["steps"] = GPTQ
    w.machine = Machine(activation_bytes=0)
    w.fails("pwrite", errno.ENOSPC)


C, R, N = CheckpointError, RecipeError, NumericsError
FAULTS = [
    # the model
    Fault("no such model", C, ("/nowhere", "no such model folder"), settings(model="/nowhere/at/all")),
    Fault("model out of reach", C, ("nobody/nothing", "check the network", "give its folder"), offline),
    Fault("model is a file", C, ("text.txt", "is a file", "name the folder"), lambda w: settings(model=str(w.text))(w)),
    Fault("no config.json", C, ("model", "no config.json"), remove("config.json")),
    Fault("config.json is no JSON", C, ("config.json", "not JSON", "fetch it again"), replace("config.json", "{,\n}")),
    Fault("config.json is a list", C, ("config.json", "object is expected", "list"), replace("config.json", "[1]")),
    Fault("config.json nested", C, ("config.json", "nested"), replace("config.json", "[" * 100_000)),
    Fault("unknown family", R, ("model", "'lama'", "'llama'"), config(model_type="lama")),
    Fault("wrong type in config", C, ("hidden_act", "mend it"), config(hidden_act=[1])),
    Fault("unknown activation", C, ("config.json", "'abc'", "mend it"), config(hidden_act="abc")),
    Fault("positions no number", C, ("max_position_embeddings='x'",), config(max_position_embeddings="x")),
    Fault("other width in config", C, ("32", "config.json"), config(intermediate_size=32)),
    Fault("other vocabulary in config", C, ("embed_tokens", "288", "vocab_size=300"), config(vocab_size=300)),
    Fault("more blocks in config", C, ("num_hidden_layers=5", "mend"), config(num_hidden_layers=5)),
    Fault("fewer blocks in config", C, ("layers.2", "num_hidden_layers=2", "mend"), config(num_hidden_layers=2)),
    Fault("quantized by gptq in name only", C, ("model", "gptq", "qweight", "fetch it again"), quantized_by("gptq")),
    Fault("quantized by awq in name only", C, ("model", "awq", "qweight", "fetch it again"), quantized_by("awq")),
    Fault("quantized by others", C, ("model", "'exl2'", "use the original"), quantized_by("exl2")),
    Fault("pickled weights", C, ("model", "pickle", "safetensors"), only("pytorch_model.bin")),
    Fault("GGUF", C, ("model", "GGUF", "original"), only("model.gguf")),
    Fault("no weights", C, ("no model.safetensors",), remove("model.safetensors")),
    # its files
    Fault("truncated shard", C, ("model.safetensors", "truncated", "fetch it again"), lambda w: os.truncate(w.shard, 99_999)),
    Fault("truncated header", C, ("model.safetensors", "truncated", "fetch it again"), lambda w: os.truncate(w.shard, 50)),
    Fault("empty shard", C, ("model.safetensors", "(0 bytes)", "fetch it again"), lambda w: os.truncate(w.shard, 0)),
    Fault("surplus bytes", C, ("model.safetensors", "damaged"), lambda w: w.shard.open("ab").write(b"0123")),
    Fault("header is no JSON", C, ("model.safetensors", "unreadable", "fetch it again"), header_of(b"\xff{ab\n\x00")),
    Fault("header is a list", C, ("model.safetensors", "unreadable", "fetch it again"), header_of(b"[1, 2, 3]")),
    Fault("header nested", C, ("model.safetensors", "unreadable", "fetch it again"), header_of(b"[" * 100_000)),
    Fault("offsets overlap", C, ("overlaps", "fetch it again"), header(lambda h: h.update({EMBEDDING: h[HEAD]}))),
    Fault("offsets huge", C, (HEAD, "impossible"), header(lambda h: h[HEAD].update(data_offsets=[0, 2**70]))),
    Fault("offsets infinite", C, (HEAD, "impossible"), header(lambda h: h[HEAD].update(data_offsets=[0, 1e999]))),
    Fault("offsets negative", C, (HEAD, "impossible"), header(lambda h: h[HEAD].update(data_offsets=[-8, 8]))),
    Fault("shape huge", C, (HEAD, "takes"), header(lambda h: h[HEAD].update(shape=[2**60, 64]))),
    Fault("unknown dtype", C, (HEAD, "'F4'", "BF16"), header(lambda h: h[HEAD].update(dtype="F4"))),
    Fault("name of two lines", C, ("model.safetensors", "\\n"), header(lambda h: h.update({"a\nb": h.pop(HEAD)}))),
    Fault("missing shard", C, ("00002-of", "missing", "fetch"), lambda w: next(w.sharded().parent.glob("*00002-of*")).unlink()),
    Fault("index names no file", C, ("index.json", "weight_map"), index(lambda i: i.update(weight_map={"a": 1}))),
    Fault("index without map", C, ("index.json", "weight_map"), index(lambda i: i.pop("weight_map"))),
    Fault("index names an absent shard", C, ("x.safetensors", "missing"), mapped({HEAD: "x.safetensors"})),
    Fault("index names an absent tensor", C, ("'ghost'", "fetch it again"),
          mapped({"ghost": "model-00001-of-00004.safetensors"})),
    Fault("missing linear", C, ("layers.1.mlp.up_proj.weight", "missing"), without("model.layers.1.mlp.up_proj.weight")),
    Fault("missing norm", C, ("layers.1.input_layernorm.weight", "missing"), without("model.layers.1.input_layernorm.weight")),
    Fault("cannot be read", C, ("model.safetensors", "Input/output error", "disk"),
          fails("preadv", errno.EIO, "model.safetensors", 9)),
    # its numbers
    Fault("NaN in a linear", C, ("layers.1.mlp.up_proj.weight", "NaN", "fetch it again"),
          poke("model.layers.1.mlp.up_proj.weight", torch.nan)),
    Fault("infinity in a linear", C, ("layers.2.mlp.up_proj.weight", "infinity", "fetch it again"),
          poke("model.layers.2.mlp.up_proj.weight", torch.inf)),
    Fault("NaN in a norm", C, ("layers.0.input_layernorm.weight", "NaN"),
          poke("model.layers.0.input_layernorm.weight", torch.nan)),
    Fault("NaN in the final norm", C, ("model.norm.weight", "NaN"), poke("model.norm.weight", torch.nan)),
    Fault("NaN in the token table", C, (EMBEDDING, "NaN"), poke(EMBEDDING, torch.nan)),
    Fault("NaN in the head", C, (HEAD, "NaN", "fetch it again"), poke(HEAD, torch.nan)),
    Fault("beyond float16", N, ("embed_tokens", "float16", "bfloat16"), beyond_float16),
    # its tokenizer
    Fault("no tokenizer", C, ("model", "tokenizer", "copy"), remove("tokenizer.json")),
    Fault("another model's tokenizer", C, ("499", "288", "another model's tokenizer"), vocabulary(500)),
    Fault("token without embedding", C, ("299", "288", "another model's tokenizer"), added_token),
    Fault("tokenizer is no JSON", C, ("tokenizer.json", "fetch it again"), replace("tokenizer.json", "{")),
    Fault("tokenizer is no tokenizer", C, ("tokenizer", "copy"), replace("tokenizer.json", '{"model": {"vocab": {}}}')),
    # the text
    Fault("empty text", R, ("calibration.data", "empty.txt", "empty"), data_file("empty.txt", "")),
    Fault("blank text", R, ("calibration.data", "blank.jsonl", "empty"), data_file("blank.jsonl", '{"text": " "}\n' * 9)),
    Fault("too little text", R, ("calibration.samples", "use", "more text"), data_file("short.txt", WORDS)),
    Fault("text not found", R, ("calibration.data", "gone.txt", "shipped"), settings(calibration__data="/gone/gone.txt")),
    Fault("data set out of reach", R, ("owner/set", "use files", "shipped"), settings(calibration__data="owner/set")),
    Fault("no text named", R, ("calibration.data", "shipped"), settings(calibration__data=None)),
    Fault("longer than the model", R, ("calibration.length", "512", "256"), settings(calibration__length=512)),
    Fault("evaluation too long", R, ("evaluation.length", "512", "256"),
          settings(evaluation={"data": "shipped", "length": 512})),
    Fault("evaluation text not found", R, ("evaluation.data", "gone.txt"), settings(evaluation={"data": "/gone/gone.txt"})),
    # the recipe
    Fault("group does not divide", R, ("group_size", "48", "64"), settings(steps=[{"rtn": {"bits": 4, "group_size": 48}}])),
    Fault("pattern without layers", R, ("steps.0", "*.up_prj"), steps(layers="*.up_prj")),
    Fault("override without layers", R, ("steps.0", "*.down_prj"), steps(overrides={"*.down_prj": {"bits": 8}})),
    Fault("all layers skipped", R, ("steps.0", "skip"), steps(skip="*")),
    Fault("no such device", R, ("--device abc", "cpu"), lambda w: setattr(w, "machine", Machine(device="abc"))),
    # the folder of the result
    Fault("out is a file", R, ("text.txt", "is a file", "--out"), out_is("text.txt")),
    Fault("out below a file", C, ("text.txt", "file stands", "--out"), out_is("text.txt/below")),
    Fault("out has too long a name", R, ("cannot be used", "--out"), out_is("x" * 300)),
    Fault("out is the model", R, ("model", "model itself", "--out"), out_is("model")),
    Fault("out is the model that it made", R, ("out", "model itself", "--out"), result_into_itself, keeps=True),
    Fault("out is not ours", R, ("out", "not made by compress", "--out"), foreign, keeps=True),
    Fault("unfinished with another recipe", R, ("out", "another recipe", "--overwrite"), other_recipe, keeps=True),
    Fault("finished with another recipe", R, ("out", "result of another run", "--overwrite"),
          lambda w: finished(w, GPTQ), keeps=True),
    Fault("finished and cut", C, ("00002-of", "changed", "--overwrite"), finished_and(cut_shard), keeps=True),
    Fault("finished without config", C, ("config.json", "missing", "--overwrite"),
          finished_and(lambda out: (out / CONFIG).unlink()), keeps=True),
    Fault("report is no JSON", C, ("compress_report.json", "--overwrite"),
          finished_and(lambda out: (out / REPORT).write_text("{")), keeps=True),
    Fault("another run is at it", C, ("out", "another run", "wait"), locked, keeps=True),
    Fault("no room from the start", C, ("out", "MiB free", "--out"), no_room),
    Fault("no room for activations", C, ("out", "do not fit into memory", "20 MiB free", "--activation-memory"), no_room_beside),
    Fault("disk full at a shard", C, ("00003-of", "disk is full", "finished blocks are kept"),
          fails("fsync", errno.ENOSPC, "00003-of")),
    Fault("disk full at a rename", C, ("00003-of", "disk is full"), fails("replace", errno.ENOSPC, "00003-of")),
    Fault("disk full at the journal", C, ("journal", "disk is full"), fails("fsync", errno.ENOSPC, "journal.jsonl", 4)),
    Fault("disk full at the tokenizer", C, ("tokenizer.json", "disk is full"), fails("fsync", errno.ENOSPC, "tokenizer.json")),
    Fault("disk full at config.json", C, ("config.json", "disk is full"), fails("replace", errno.ENOSPC, "out/config.json")),
    Fault("disk full of activations", C, (".compress", "activations", "the disk is full", "calibration.samples"), spilled),
    Fault("quota used up", C, ("quota", "00003-of"), fails("fsync", errno.EDQUOT, "00003-of")),
    Fault("disk breaks", C, ("00003-of", "Input/output error"), fails("fsync", errno.EIO, "00003-of")),
    Fault("read-only disk", C, ("out", "read-only", "--out"), fails("mkdir", errno.EROFS)),
    Fault("no permission", C, ("out", "no permission", "--out"), fails("mkdir", errno.EACCES)),
    Fault("no locks there", C, ("out", "cannot be locked", "--out"), lambda w: w.patch.setattr("fcntl.flock", _no_locks)),
]  # fmt: skip


def _no_locks(*_: Any) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ready")
    save_tiny("llama", folder / "model")
    (folder / "text.txt").write_text(WORDS * 20)
    return folder


@pytest.fixture
def work(ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    shutil.copytree(ready, tmp_path / "work")
    recipe = {
        "model": str(tmp_path / "work" / "model"),
        "calibration": {"data": str(tmp_path / "work" / "text.txt"), "samples": 4, "length": 32},
        "steps": RTN,
    }
    return Workspace(tmp_path / "work", monkeypatch, recipe, tmp_path / "work" / "out")


NEEDS_TEXT = ("calibration.", "tokenizer", "299", "499", "owner/set", "activations")


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_one_line_with_the_remedy(fault: Fault, work: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    if any(mark in said for said in fault.says for mark in NEEDS_TEXT):
        work.recipe["steps"] = GPTQ
    fault.put(work)
    before = contents(work.out) if fault.keeps else {}
    with pytest.raises(CompressError) as caught:
        work.run()
    line = str(caught.value)
    assert type(caught.value) is fault.error, line
    assert "\n" not in line
    assert len(line) < LONGEST_LINE
    assert all(said in line for said in fault.says), line
    if fault.keeps:
        assert contents(work.out) == before
    elif os.path.isdir(work.out) and not work.out.samefile(work.model):
        assert_no_model(work.out)
        assert not list(work.out.rglob("*.partial"))
    assert_command_line_says(line, work, fault, capsys)


def assert_command_line_says(line: str, work: Workspace, fault: Fault, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with the same line and a code that is not zero."""
    from compress.cli.main import main

    recipe = work.folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(work.recipe))
    arguments = ["run", "--recipe", str(recipe), "--out", str(work.out), "--device", work.machine.device, "--quiet"]
    if work.machine.activation_bytes is not None:
        arguments += ["--activation-memory", str(work.machine.activation_bytes)]
    capsys.readouterr()
    assert main([*arguments, *(["--overwrite"] if work.overwrite else [])]) in (1, 2)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1, shown.err
    assert all(said in shown.err for said in fault.says), shown.err


def test_without_a_fault_it_runs(work: Workspace) -> None:
    assert read_headers(work.run().folder)


RESUMABLE = [fault for fault in FAULTS if fault.name.startswith(("disk", "quota", "another run", "no room"))]


@pytest.mark.parametrize("fault", RESUMABLE[::3], ids=str)
def test_mended_it_goes_on(fault: Fault, work: Workspace, tmp_path: Path) -> None:
    expected = run(Recipe.from_dict({**work.recipe, "steps": GPTQ}), tmp_path / "expected").folder
    work.recipe["steps"] = GPTQ
    with pytest.MonkeyPatch.context() as patch:
        work.patch = patch
        fault.put(work)
        with pytest.raises(CompressError):
            work.run()
    if "lock" in vars(work):
        work.lock.__exit__(None, None, None)  # type: ignore[attr-defined]
    work.run()
    assert contents(work.out) == contents(expected)


# --- the real thing: a disk of two megabytes, a disk that cannot be written


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a small disk in memory; skips where that is not permitted."""
    mounted: list[Path] = []

    def make(options: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode != 0:
            pytest.skip(f"mounting a small disk is not permitted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount command here")
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8, 0.95])
def test_a_disk_that_fills_up(share: float, work: Workspace, mount: Callable[..., Path]) -> None:
    expected = work.run().folder
    pages = sum(-(-f.stat().st_size // 4096) for f in expected.iterdir() if f.name not in (REPORT, PAGE))
    disk = mount(f"size={int(share * pages) * 4096}")
    work.out = disk / "result"
    work.patch.setattr("compress.pipeline.run.DISK_SLACK", -(2**30))  # or it would be refused from the start
    with pytest.raises(CheckpointError, match="disk is full") as caught:
        work.run()
    assert "\n" not in str(caught.value)
    assert_no_model(work.out)
    subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
    work.run()
    assert contents(work.out) == contents(expected)


@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount command here")
@pytest.mark.parametrize("begun", [False, True], ids=["new", "begun"])
def test_a_disk_that_cannot_be_written(begun: bool, work: Workspace, mount: Callable[..., Path]) -> None:
    disk = mount("size=8m")
    work.out = disk / "result"
    if begun:
        work.interrupted()
    before = contents(disk)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(CheckpointError, match=r"read-only; choose another folder with --out"):
        work.run()
    assert contents(disk) == before


@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount command here")
def test_a_finished_result_on_a_read_only_disk_is_still_known(work: Workspace, mount: Callable[..., Path]) -> None:
    disk = mount("size=8m")
    work.out = disk / "result"
    work.run()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert work.run().already_finished


# --- every field of a recipe, wrong in turn


WRONG: list[tuple[str, Any]] = [
    ("model", 7), ("model", ""), ("model.path", 7), ("model.path", ""), ("model.revision", 1.5), ("model.dtype", "float8"),
    ("model.trust_remote_code", "maybe"), ("model.pth", "x"),
    ("calibration", 7), ("calibration.data", 7), ("calibration.data", []), ("calibration.split", 7), ("calibration.subset", 7),
    ("calibration.column", 7), ("calibration.chat", "no"), ("calibration.samples", 0), ("calibration.samples", "many"),
    ("calibration.length", 1), ("calibration.length", 2.5), ("calibration.seed", -1), ("calibration.packing", "loose"),
    ("calibration.batch_size", 0), ("calibration.dtype", "int8"), ("calibration.sampels", 4),
    ("steps", []), ("steps", {}), ("steps", None), ("steps.0", "gptq"), ("steps.0", {}), ("steps.0", {"gtpq": {}}),
    ("steps.0", {"gptq": {}, "rtn": {}}), ("steps.0.layers", 7), ("steps.0.layers", []), ("steps.0.layers", "re:("),
    ("steps.0.skip", 7), ("steps.0.overrides", 7), ("steps.0.overrides", {"*": {"bits": 99}}), ("steps.0.overrides", {"*": 4}),
    ("steps.0.gptq", 7), ("steps.0.gptq.bits", 0), ("steps.0.gptq.bits", "4"), ("steps.0.gptq.bits", True),
    ("steps.0.gptq.group_size", 0), ("steps.0.gptq.group_size", 1.5), ("steps.0.gptq.symmetric", "yes"),
    ("steps.0.gptq.order", "random"), ("steps.0.gptq.bit", 4),
    ("evaluation", 7), ("evaluation", True), ("evaluation.data", 7), ("evaluation.data", []), ("evaluation.length", 1),
    ("evaluation.stride", 0), ("evaluation.max_tokens", 1), ("evaluation.reference", "x"), ("evaluation.lenght", 4),
    ("evaluation.speed", "fast"), ("evaluation.tasks", 7), ("evaluation.tasks", []), ("evaluation.include_path", 7),
    ("evaluation.num_fewshot", -1), ("evaluation.limit", 0), ("evaluation.batch_size", 0), ("evaluation.batch_size", "many"),
    ("evaluation.apply_chat_template", "x"), ("output.push_to_hub", 7), ("output.push_to_hub", {"repo": ""}),
    ("output", 7), ("output.path", 7), ("output.path", ""), ("output.format", "gguf"), ("output.compression", "zip"),
    ("seed", -1), ("seed", "x"), ("sede", 1),
]  # fmt: skip


def put(recipe: Any, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        key = int(parent) if parent.isdigit() else parent
        if not isinstance(recipe, list) and not isinstance(recipe.get(key), (dict, list)):
            recipe[key] = {}
        recipe = recipe[key]
    recipe[int(last) if last.isdigit() else last] = value


@pytest.mark.parametrize(("path", "value"), WRONG, ids=[f"{path}={value!r}" for path, value in WRONG])
def test_a_recipe_with_one_field_wrong(
    path: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from compress.cli.main import main

    recipe: dict[str, Any] = {
        "model": {"path": "shipped"}, "calibration": {"data": "shipped", "samples": 4, "length": 32},
        "steps": [{"gptq": {"bits": 4}}], "evaluation": {"data": "shipped"}, "output": {"format": "auto"},
    }  # fmt: skip
    put(recipe, path, value)
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(recipe)
    key = path.split(".")[-1]
    assert "\n" not in str(caught.value)
    assert key in str(caught.value) or path.rpartition(".")[0] in str(caught.value)
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump(recipe))
    assert main(["run", "--recipe", str(file), "--out", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert str(file) in shown.err
    assert not (tmp_path / "out").exists()


def test_every_field_is_wrong_once() -> None:
    """Holds the list above to the recipe: a new field needs a wrong value there."""
    from compress.recipe import Calibration, Evaluation, Model, Output

    sections = {"model": Model, "calibration": Calibration, "evaluation": Evaluation, "output": Output}
    fields = {
        *Recipe.model_fields,
        *(f"{name}.{f}" for name, section in sections.items() for f in section.model_fields),
    }
    optional_text = {"evaluation.split", "evaluation.subset", "evaluation.column"}  # as those of calibration
    assert fields - optional_text <= {path for path, _ in WRONG}
