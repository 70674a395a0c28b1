"""What of a result is published: its files, less all that tells of the machine on which it was made.

A recipe and a report name folders and files of that machine. Published copies name what can be found elsewhere: the id of the
base model, the name of a text file without its path. Weights and tokenizer go as they are; the folder is not touched.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from compress.checkpoint.description import modules_of
from compress.checkpoint.headers import read_headers, read_json, weight_files
from compress.checkpoint.result import CARD, RECIPE, REPORT, refuse_unfinished
from compress.checkpoint.seal import SEAL
from compress.checkpoint.source import SIDE_FILES
from compress.errors import CheckpointError, naming
from compress.publish.base_model import card_of, carried
from compress.publish.card import ANYWHERE, FIGURE, is_local, is_untouched, model_card, signed

BESIDE = (
    "config.json", "*.safetensors.index.json", RECIPE, CARD, REPORT, "compress_*.html", "compress_*.json", "stack.json",
    "quantize_config.json", "quant_config.json", *SIDE_FILES,
)  # fmt: skip
TEMPLATES = "additional_chat_templates"
# A path of a machine in free text; what it begins with tells it from a URL, or from a/b.
PATH = re.compile(
    r"(?<![\w/:.<])(?:~|/(?:home|Users|root|tmp|mnt|media|data|work|var|opt|srv|scratch|private|workspace))"
    r"(?:/[^\s/'\",;:)<>`]+)+"
)
NEEDED = ("layers", "format", "format_reason", "symmetric", "base", "bits_per_weight", "files") + tuple(
    f"bytes_{what}" for what in ("before", "after", "total_before", "total_after")
)  # of a report, for the card
NAME_KEYS = ("_name_or_path", "name_or_path")


@dataclass(frozen=True)
class Result:
    """A finished folder, checked. `report` is None if another tool, or an export, made it."""

    folder: Path
    report: dict[str, Any] | None
    config: dict[str, Any]
    weights: tuple[str, ...]
    files: tuple[str, ...]  # all that belongs to it, weights included
    left_out: tuple[str, ...]

    @property
    def base(self) -> str | None:
        """Id of the base model on the Hub, if it has one."""
        if self.report is not None:
            return (self.report.get("base") or {}).get("id")
        named = card_of(self.folder).get("base_model")
        return named if isinstance(named, str) and named.count("/") == 1 and not is_local(named) else None


@dataclass(frozen=True)
class Publication:
    """Path in the repository -> the file that goes there, or content made for it."""

    files: dict[str, Path | bytes]
    users_card: bool
    base: str | None

    def sizes(self) -> dict[str, int]:
        return {n: len(f) if isinstance(f, bytes) else f.stat().st_size for n, f in sorted(self.files.items())}

    @property
    def card(self) -> str:
        content = self.files[CARD]
        return (content if isinstance(content, bytes) else content.read_bytes()).decode()


def read_result(folder: Path) -> Result:
    """Look at a folder that is to be published.

    Raises: CheckpointError if it is no whole checkpoint: unfinished, files missing, cut or of another model.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; name the one that holds the result")
    refuse_unfinished(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json in it; name the folder of a finished run")
    config = read_json(folder / "config.json")
    infos = read_headers(folder)
    with naming(folder):
        modules_of(config, infos)
    report = read_json(folder / REPORT) if (folder / REPORT).is_file() else None
    if report is not None and not (set(NEEDED) <= set(report) and isinstance(report["layers"], list)):
        raise CheckpointError(
            f"{folder / REPORT}: not the report of a run of this version; make the result again with --overwrite"
        )
    weights = tuple(file.name for file in (*weight_files(folder), *sorted(folder.glob("stack-*.safetensors"))))
    listed = (report or {}).get("files", {})
    for name, size in listed.items():
        file = folder / name
        if not file.is_file() or (name.endswith(".safetensors") and file.stat().st_size != size):
            raise CheckpointError(f"{file}: is missing or was changed after the run; make it again with --overwrite")
    present = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
    patterns = (*BESIDE, *(("*.py",) if "auto_map" in config else ()))
    files = tuple(n for n in present if n in weights or n in listed or _belongs(n, patterns))
    return Result(folder, report, config, weights, files, tuple(n for n in present if n not in files))


def _belongs(name: str, patterns: Iterable[str]) -> bool:
    if "/" in name:
        return name.startswith(f"{TEMPLATES}/")
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def publication(
    result: Result,
    repo: str,
    *,
    base: str | None = None,
    base_fields: Mapping[str, Any] | None = None,
    figure: bytes | None = None,
    notes: tuple[str, ...] = (),
) -> Publication:
    """Everything that goes into the repository.

    Args:
        base: id of the base model, where the result does not know it (a local folder), or knows it wrongly.
        base_fields: fields of the base model's card; by default what the folder's own card carries.
        figure: a PNG for the card.
        notes: sentences for the card on the base model.
    """
    base = base or result.base
    files: dict[str, Path | bytes] = {name: result.folder / name for name in result.files}
    scrub = Scrub(result)
    if result.report is not None:
        report = published_report({**result.report, "base": _base(result.report, base)}, scrub)
        files[REPORT] = (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode()
    for name in result.files:
        if name.endswith(".html"):
            files[name] = scrub((result.folder / name).read_text(encoding="utf-8")).encode()
    recipe = _recipe(result.folder / RECIPE, base, scrub) if RECIPE in result.files else None
    if recipe is not None:
        files[RECIPE] = recipe.encode()
    if SEAL in result.files:  # it holds checksums of config.json and the like, which stay as they are
        seal = scrub.value(read_json(result.folder / SEAL))
        files[SEAL] = (json.dumps(seal, indent=2, ensure_ascii=False) + "\n").encode()
        files |= _exported_card(result, repo, scrub)
    else:
        files |= _anonymous(result)
    users = CARD in result.files and not is_untouched((result.folder / CARD).read_text(encoding="utf-8"))
    if not users:
        if result.report is None:
            raise CheckpointError(
                f"{result.folder}: no report of a run and no {CARD} in it to make a card from; write a {CARD} first"
            )
        if figure is not None:
            files[FIGURE] = figure
        fields = card_of(result.folder) if base_fields is None else base_fields
        kept = carried(fields, base, set(files))
        made = model_card(report, kept, repo=repo, recipe=recipe, figure=figure is not None, notes=notes)
        files[CARD] = signed(scrub(made)).encode()
    return Publication(files, users, base)


def _base(report: Mapping[str, Any], base: str | None) -> dict[str, Any]:
    known = dict(report.get("base", {}))
    if base and base != known.get("id"):
        return {"id": base, "title": base.split("/")[-1], "commit": None}
    return known


def _exported_card(result: Result, repo: str, scrub: Scrub) -> dict[str, Path | bytes]:
    """The card that an export wrote, with the repository in place of a folder."""
    if CARD not in result.files:
        return {}
    card = (result.folder / CARD).read_text(encoding="utf-8")
    return {CARD: scrub(card.replace(ANYWHERE, repo)).encode()}


class Scrub:
    """Takes paths of this machine out of a text; of each, its last part stays."""

    def __init__(self, result: Result):
        report = result.report or {}
        evaluation = report.get("evaluation") or {}
        known = [
            str(result.folder),
            str(result.folder.absolute()),
            report.get("out"),
            report.get("model"),
            str(Path.home()),
        ]
        known += [evaluation.get(role, {}).get("path") for role in ("model", "reference")]
        known += list((evaluation.get("text") or {}).get("data", ()))
        if SEAL in result.files:
            known.append(read_json(result.folder / SEAL).get("source"))
        local = {
            path for path in known if isinstance(path, str) and ("/" in path or path.startswith("~")) and is_local(path)
        }
        self.paths = sorted(local, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for path in self.paths:
            for form in (path, json.dumps(path)[1:-1]):
                text = re.sub(rf"(?<![\w/.]){re.escape(form)}(?![\w.-])", Path(path).name, text)
        return PATH.sub(lambda found: found[0].rstrip("/.").rsplit("/", 1)[-1], text)

    def value(self, content: Any) -> Any:
        """Every text in what JSON holds."""
        if isinstance(content, str):
            return self(content)
        if isinstance(content, dict):
            return {self(key): self.value(value) for key, value in content.items()}
        return [self.value(value) for value in content] if isinstance(content, list) else content


def published_report(report: Mapping[str, Any], scrub: Scrub) -> dict[str, Any]:
    """The report without folders of this machine and without the text of benchmark questions."""
    kept = {key: value for key, value in report.items() if key not in ("out", "machine")}
    base = kept.get("base", {})
    kept["model"] = base.get("id") or base.get("title")
    if isinstance(kept.get("work"), dict):
        kept["work"] = {**kept["work"], "model": kept["model"]}
    evaluation = dict(kept.get("evaluation") or {})
    if isinstance(evaluation.get("tasks"), dict):
        evaluation["tasks"] = {
            role: {k: v for k, v in found.items() if k != "samples"} if isinstance(found, dict) else found
            for role, found in evaluation["tasks"].items()
        }
    return scrub.value({**kept, "evaluation": evaluation})


def _recipe(file: Path, base: str | None, scrub: Scrub) -> str:
    """recipe.yaml with what others can find: no paths, no folder of the result, no repository."""
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); make the result again with --overwrite") from None
    model = recipe.get("model")
    if isinstance(model, dict):
        model["path"] = base or Path(model.get("path", "model")).name
    for section in ("calibration", "evaluation"):
        data = (recipe.get(section) or {}).get("data")
        if isinstance(data, list):
            recipe[section]["data"] = [
                Path(name).name if is_local(name) and name != "shipped" else name for name in data
            ]
    output = {k: v for k, v in (recipe.get("output") or {}).items() if k not in ("path", "push_to_hub")}
    recipe["output"] = output
    return scrub(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=120))


def _anonymous(result: Result) -> dict[str, Path | bytes]:
    """config.json and tokenizer_config.json, where they say from which folder they were once loaded."""
    changed: dict[str, Path | bytes] = {}
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        if name not in result.files:
            continue
        content = read_json(result.folder / name)
        paths = [key for key in NAME_KEYS if isinstance(content.get(key), str) and is_local(content[key])]
        if paths:
            kept = {key: value for key, value in content.items() if key not in paths}
            changed[name] = (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()
    return changed
