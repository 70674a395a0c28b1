"""`save_pretrained` of a model in our own format: what transformers writes, under names of our own, with the guard.

transformers writes `model.safetensors` and drops `transformers_weights` from config.json. A copy like that would load
without this package, as a model with random weights. So it is written into a folder of its own first and becomes
visible with the guard in it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from types import MethodType
from typing import Any

from compress.checkpoint.description import GUARD, OWN_INDEX
from compress.checkpoint.headers import read_header, read_json

_PREVIOUS = re.compile(r"(model|compress)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def guard_saving(model: Any) -> None:
    """Let every `save_pretrained` of this model, push_to_hub included, write the guard."""
    model.save_pretrained = MethodType(save_pretrained, model)


def save_pretrained(
    self: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = "50GB",
    variant: str | None = None,
    token: str | bool | None = None,
    **kwargs: Any,
) -> None:
    """Save as transformers does, in a form that fails with a helpful sentence where compress-llm is missing."""
    if variant is not None:
        raise ValueError(f"variant={variant!r}: a compressed checkpoint has no variants; save without it")
    hub = {key: kwargs.pop(key) for key in ("repo_id", "commit_message", "create_pr", "private") if key in kwargs}
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    quantizer = self.hf_quantizer
    work = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        quantizer.guarded = True
        quantizer.describe_as_it_is(self)
        type(self).save_pretrained(
            self, work, is_main_process, state_dict, max_shard_size=max_shard_size, token=token, **kwargs
        )
        _guard(work)
        written = _move(work, folder)
    finally:
        quantizer.guarded = False
        shutil.rmtree(work, ignore_errors=True)
    if push_to_hub and written:
        _push(folder, written, token, **hub)


def _guard(work: Path) -> None:
    """Weights under our own names with an index, and the sentence in config.json."""
    if not (work / "config.json").is_file():
        return  # an adapter alone, which holds none of our tensors
    (work / "model.safetensors.index.json").unlink(missing_ok=True)
    shards = sorted(work.glob("model*.safetensors"))
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        name = f"compress-{number:05d}-of-{len(shards):05d}.safetensors"
        for tensor, info in read_header(shard).items():
            weight_map[tensor] = name
            total += info.nbytes
        shard.rename(work / name)
    if shards:
        _write_json(
            work / OWN_INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        )
    _write_json(work / "config.json", {**read_json(work / "config.json"), "transformers_weights": GUARD})


def _move(work: Path, folder: Path) -> list[str]:
    """Everything from `work` to `folder`, config.json last; weights of a previous save go. Returns what was moved."""
    names = sorted((path.name for path in work.iterdir()), key=lambda name: (name == "config.json", name))
    if any(name.endswith(".safetensors") and name.startswith("compress-") for name in names):
        for old in folder.iterdir():
            if _PREVIOUS.fullmatch(old.name):
                old.unlink()
    for name in names:
        if (work / name).is_dir():
            shutil.copytree(work / name, folder / name, dirs_exist_ok=True)
        else:
            os.replace(work / name, folder / name)
    return names


def _push(
    folder: Path,
    names: list[str],
    token: str | bool | None,
    repo_id: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    private: bool | None = None,
) -> None:
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo = api.create_repo(repo_id or folder.resolve().name, private=private, exist_ok=True).repo_id
    patterns = [*names, *(f"{name}/*" for name in names)]
    message = commit_message or "Upload model"
    api.upload_folder(
        folder_path=folder, repo_id=repo, commit_message=message, create_pr=create_pr, allow_patterns=patterns
    )


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


save_pretrained.__qualname__ = "save_pretrained"
