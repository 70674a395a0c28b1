"""`compress doctor`."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import typer

from compress.cli.options import Debug, Json

DISTRIBUTION = "compress-llm"
OPTIONAL = {  # what is lost without it, and how to get it
    "compressed-tensors": (
        "stock transformers needs it to load results in its format",
        "pip install 'compress-llm[export]'",
    ),
}
OLDEST_PYTHON = (3, 10)
HUB_SECONDS = 4.0
LITTLE_DISK = 10 * 2**30
LITTLE_MEMORY = 2 * 2**30

Offline = Annotated[bool, typer.Option("--offline", help="do not try to reach the Hub")]


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `missing` makes the command fail; `note` is worth knowing."""

    what: str
    status: Literal["ok", "note", "missing"]
    found: str
    remedy: str = ""


def doctor(offline: Offline = False, as_json: Json = False, debug: Debug = False) -> None:
    """Look whether this machine has what is needed: versions, devices, memory, disk, the Hub.

    What is missing is named, with the way to get it; then the exit code is not zero.

    \b
    Example:  compress doctor
    """
    from compress.cli.show import note, out, print_json, show, table

    findings = list(examine(offline))
    missing = [f for f in findings if f.status == "missing"]
    if as_json:
        print_json({"ok": not missing, "findings": [asdict(f) for f in findings]})
    else:
        show(table(("", "what", "found"), [(f.status, f.what, f.found) for f in findings]))
        remedies = [f for f in findings if f.remedy]
        if remedies:
            out("")
            show(table(("to do", ""), [(f.what, f.remedy) for f in remedies]))
    if missing:
        note(f"error: missing: {', '.join(f.what for f in missing)}")
        raise typer.Exit(1)


def examine(offline: bool) -> Iterator[Finding]:
    """Everything, in the order in which it is shown."""
    yield _python()
    yield from _versions()
    looks: tuple[Callable[[], Finding], ...] = (
        _torch, _transformers, _shipped_model, _memory, _disk, lambda: _hub(offline), _kernels, _cuda_kernels, _compilers,
    )  # fmt: skip
    for look in looks:
        yield look()


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST_PYTHON:
        return Finding("python", "missing", found, "use Python 3.10 or newer")
    return Finding("python", "ok", found)


def requirements() -> list[str]:
    """What the package asks for, as its metadata has it; in a checkout that is not installed, from pyproject.toml."""
    try:
        return metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        pass
    project = Path(__file__).parents[2] / "pyproject.toml"
    try:
        import tomllib

        written = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    except (ImportError, OSError, KeyError, ValueError):
        return []
    extra = written.get("optional-dependencies", {}).get("export", [])
    return [*written["dependencies"], *(f"{line} ; extra == 'export'" for line in extra)]


def _versions() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    yield Finding(
        "compress-llm", "ok", metadata_version(DISTRIBUTION) or f"{_own_version()}, not installed: a checkout"
    )
    for line in requirements():
        wanted = Requirement(line)
        optional = wanted.marker is not None
        if optional and wanted.name not in OPTIONAL:
            continue
        version = metadata_version(wanted.name)
        loss, remedy = OPTIONAL.get(wanted.name, ("", f"pip install '{wanted.name}{wanted.specifier}'"))
        if version is None:
            yield Finding(
                wanted.name, "note" if optional else "missing", f"not installed{': ' if loss else ''}{loss}", remedy
            )
        elif not wanted.specifier.contains(version, prereleases=True):
            yield Finding(wanted.name, "note", f"{version}, outside {wanted.specifier}: not tested", remedy)
        else:
            yield Finding(wanted.name, "ok", f"{version} ({wanted.specifier})")


def metadata_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _own_version() -> str:
    from compress import __version__

    return __version__


def _torch() -> Finding:
    try:
        import torch
    except Exception as error:  # a broken install fails in many ways
        return Finding(
            "devices", "missing", f"torch cannot be imported: {error}", "pip install --force-reinstall torch"
        )
    from compress.cli.show import human_bytes

    cpu = f"cpu: {len(_cores())} cores, {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        built = "this torch is built without CUDA" if torch.version.cuda is None else "no GPU is visible to torch"
        return Finding("devices", "ok", f"{cpu}; no cuda ({built})")
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    listed = ", ".join(f"cuda:{i} {g.name} {human_bytes(g.total_memory)}" for i, g in enumerate(gpus))
    return Finding("devices", "ok", f"{cpu}; {listed}")


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _transformers() -> Finding:
    """Our format is registered with this release of transformers."""
    import warnings

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            from transformers.quantizers import auto

            from compress.checkpoint.registration import METHOD
        known = METHOD in auto.AUTO_QUANTIZER_MAPPING
    except Exception as error:
        return Finding(
            "loading", "missing", f"transformers cannot be imported: {error}", "pip install 'transformers>=5.17,<6'"
        )
    if not known:
        said = "; ".join(str(w.message) for w in caught) or "not registered"
        return Finding("loading", "note", said, "pip install 'transformers>=5.17,<6'")
    return Finding("loading", "ok", "our format is registered with transformers")


def _shipped_model() -> Finding:
    from compress.checkpoint.source import find_source
    from compress.errors import CompressError
    from compress.shipped import NAME, calibration_text_path, heldout_text_path

    try:
        source = find_source(NAME)
        texts = [path.stat().st_size for path in (calibration_text_path(), heldout_text_path())]
    except (CompressError, OSError) as error:
        return Finding("shipped model", "missing", str(error), "pip install --force-reinstall compress-llm")
    return Finding("shipped model", "ok", f"{len(source.infos)} tensors, {sum(texts):,} bytes of text: {source.folder}")


def _memory() -> Finding:
    from compress.cli.show import human_bytes
    from compress.pipeline.estimate import available_memory

    available = available_memory()
    if available < LITTLE_MEMORY:
        return Finding(
            "memory", "note", f"{human_bytes(available)} available", "close other programs, or use small models"
        )
    return Finding("memory", "ok", f"{human_bytes(available)} available")


def _disk() -> Finding:
    from huggingface_hub import constants

    from compress.cli.show import human_bytes

    free = shutil.disk_usage(Path.cwd()).free
    cache = Path(constants.HF_HUB_CACHE)
    there = next(path for path in (cache, *cache.parents) if path.exists())
    cache_free = shutil.disk_usage(there).free
    found = f"{human_bytes(free)} free here, {human_bytes(cache_free)} in the Hub's cache {cache}"
    if min(free, cache_free) < LITTLE_DISK:
        return Finding("disk", "note", found, "a result needs room for itself; the cache moves with HF_HOME=DIR")
    return Finding("disk", "ok", found)


def _hub(offline: bool) -> Finding:
    from huggingface_hub import constants

    local = "use local folders and files, or `shipped`; unset HF_HUB_OFFLINE to go online"
    if constants.HF_HUB_OFFLINE:
        return Finding("hub", "note", "offline by HF_HUB_OFFLINE", local)
    if offline:
        return Finding("hub", "ok", "not tried (--offline)")
    why = _unreachable(constants.ENDPOINT)
    if why:
        remedy = "check network and proxy (HTTPS_PROXY, HF_ENDPOINT), or use local folders"
        return Finding("hub", "note", f"{constants.ENDPOINT}: {why}", remedy)
    return Finding("hub", "ok", f"{constants.ENDPOINT} answers")


def _unreachable(address: str) -> str | None:
    """Why the address does not answer; None if it does. Looking a name up has no time limit of its own, hence the thread."""
    import threading
    import urllib.error
    import urllib.request

    said: list[str | None] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=HUB_SECONDS).close()
            said.append(None)
        except urllib.error.HTTPError:
            said.append(None)  # it answers, if only to refuse
        except Exception as error:
            said.append(str(getattr(error, "reason", error)) or type(error).__name__)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS + 1)
    return said[0] if said else f"no answer in {HUB_SECONDS:.0f} s"


def _kernels() -> Finding:
    try:
        from compress.kernels import native
        from compress.kernels.buffers import huge_pages_possible
        from compress.kernels.build import COMMAND

        absent = native.absent()
        if absent is not None:
            remedy = "unset COMPRESS_KERNELS" if "COMPRESS_KERNELS=" in absent else absent.rpartition(": ")[2]
            return Finding("kernels", "note", f"references in torch, slow: {absent}", remedy)
        isas, current = native.isas(), native.current_isa()
    except Exception as error:
        return Finding("kernels", "note", f"references in torch, slow: {error}", "see the remedies above")
    pages = "pages of 2 MB are asked for" if huge_pages_possible() else "pages of 4 KB only"
    found = f"compiled: {current} of {', '.join(isas)}; {pages}; activations rounded to 8 bits add about 0.6 % (docs/kernels.md)"
    if native.stale():
        return Finding("kernels", "note", f"{found}; older than the sources beside it", COMMAND)
    return Finding("kernels", "ok", found)


def _cuda_kernels() -> Finding:
    try:
        from compress.kernels.cuda.status import report, this_machine

        status, found, remedy = report(this_machine())
    except Exception as error:
        return Finding("cuda kernels", "note", f"references in torch: {error}", "see the remedies above")
    return Finding("cuda kernels", status, found, remedy)


def _compilers() -> Finding:
    names = ("c++", "g++", "clang++", "cmake", "nvcc")
    found = {name: shutil.which(name) for name in names}
    present = [name for name, path in found.items() if path] or ["none"]
    return Finding(
        "compilers", "ok", f"{', '.join(present)} (c++ and cmake build the kernels of the CPU, nvcc those of GPUs)"
    )
