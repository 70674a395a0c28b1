"""The model card (README.md) of a result: what it is, what it lost, how it was made, how to load it.

Made from the report of the run, or before there is one from the plan, which has the same form. A card says nothing of the
machine: no path, no time. Its last line is a checksum of the rest, by which a card that somebody has worked on is known.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

SIGNATURE = re.compile(r"\n<!-- card by compress-llm ([0-9a-f]{16}) -->\n\Z")
STANDARD, PLAIN = "compressed-tensors", "plain"
FIGURE = "compress_card.png"
ANYWHERE = "FOLDER_OR_ID"  # in place of the repository, as long as it is not known
LOCAL_SUFFIXES = (".txt", ".raw", ".md", ".tokens", ".jsonl", ".ndjson", ".json", ".parquet", ".yaml", ".yml")


def model_card(
    report: Mapping[str, Any],
    base_fields: Mapping[str, Any],
    *,
    repo: str | None = None,
    recipe: str | None = None,
    figure: bool = False,
    notes: Sequence[str] = (),
) -> str:
    """A model card in the Hub's form.

    Args:
        report: of the run, or `Plan.to_dict()`.
        base_fields: what is taken over from the base model's card (`base_model.carried`).
        repo: the id under which it will be loaded.
        recipe: the YAML to show; else the card points to recipe.yaml.
        figure: whether `FIGURE` lies beside it.
        notes: sentences on the base model.
    """
    base = report.get("base", {})
    title = repo.split("/")[-1] if repo else f"{base.get('title', 'a model')}, compressed"
    linked = f"[{base['id']}](https://huggingface.co/{base['id']})" if base.get("id") else str(base.get("title"))
    rewrites = [step["method"] for step in report.get("rewrites", ())]
    tuning = [report["tuning"]["method"]] if report.get("tuning") else []
    methods = [*rewrites, *sorted({layer["method"] for layer in report["layers"]}), *tuning]
    front = yaml.safe_dump(_front(report, base_fields, methods), sort_keys=False, allow_unicode=True).strip()
    parts = [
        f"---\n{front}\n---",
        f"# {title}",
        f"{linked}, compressed with `compress-llm` ({', '.join(methods)}): {_extent(report)}.",
        table(("", "original", "this model"), _rows(report)),
        _measured_on(report),
        f"![What each layer lost]({FIGURE})" if figure else "",
        f"## Recipe\n\n```yaml\n{recipe.strip()}\n```" if recipe else "The recipe is in `recipe.yaml`.",
        f"## Base model\n\n{' '.join(notes)}" if notes else "",
        f"## Loading\n\n{_loading(report, repo or ANYWHERE)}",
    ]
    return signed("\n\n".join(part for part in parts if part))


def _extent(report: Mapping[str, Any]) -> str:
    if report["layers"]:
        return f"{len(report['layers'])} layers at {report['bits_per_weight']:.2f} bits per weight"
    share = 100 * report["bytes_total_after"] / max(report["bytes_total_before"], 1)
    return f"{share:.1f} % of the original's weights by bytes"


def signed(text: str) -> str:
    """A card with the line at its end by which it is known as untouched."""
    body = SIGNATURE.sub("", text).rstrip() + "\n"
    return f"{body}\n<!-- card by compress-llm {_checksum(body)} -->\n"


def is_untouched(card: str) -> bool:
    """Whether a card is one of ours as it was written."""
    found = SIGNATURE.search(card)
    return found is not None and _checksum(card[: found.start()]) == found[1]


def _checksum(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def _front(report: Mapping[str, Any], base_fields: Mapping[str, Any], methods: Sequence[str]) -> dict[str, Any]:
    fields = dict(base_fields)
    tags = dict.fromkeys(["compress-llm", str(report["format"]), *methods, *fields.pop("tags", ())])
    inherited = fields.pop("base_model", None)
    base = (report.get("base") or {}).get("id") or inherited
    front = {"base_model": base, "base_model_relation": "quantized"} if base else {}
    return {**front, "library_name": "transformers", "pipeline_tag": "text-generation", **fields, "tags": list(tags)}


def _rows(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    before, after = report["bytes_before"], report["bytes_after"]
    total_before, total_after = report["bytes_total_before"], report["bytes_total_after"]
    rows = []
    if report.get("layers"):
        rows.append(("replaced layers", mib(before), f"{mib(after)}, {report['bits_per_weight']:.3f} bits per weight"))
    rows += [
        ("all weights", mib(total_before), f"{mib(total_after)}, {100 * total_after / max(total_before, 1):.1f} %"),
    ]
    evaluation = report.get("evaluation") or {}
    if "model" in evaluation:
        theirs = evaluation.get("reference", {}).get("perplexity")
        shown = "" if theirs is None else f"{theirs:.3f}"
        rows.append(("perplexity per token", shown, f"{evaluation['model']['perplexity']:.3f}"))
    if "fidelity" in evaluation:
        fidelity = evaluation["fidelity"]
        rows.append(("KL to the original, mean per token", "", f"{fidelity['kl_mean']:.4f} nats"))
        rows.append(("top-1 agreement with the original", "", f"{100 * fidelity['top1_agreement']:.1f} %"))
    for row in (evaluation.get("tasks") or {}).get("comparison", ()):
        filtered = "" if row["filter"] == "none" else f", {row['filter']}"
        rows.append((f"{row['task']} ({row['metric']}{filtered})", f"{row['reference']:.4f}", f"{row['model']:.4f}"))
    return rows


def _measured_on(report: Mapping[str, Any]) -> str:
    evaluation = report.get("evaluation") or {}
    if "text" not in evaluation:
        return ""
    text = evaluation["text"]
    named = ", ".join(_shown(name) for name in text["data"])
    return (
        f"Perplexity, KL and agreement: {evaluation['model']['scored_tokens']:,} tokens of {named}, in windows of "
        f"{text['length']:,}."
    )


def _shown(data: str) -> str:
    """A data set as it may be named in public: of a file, its name alone."""
    if data == "shipped":
        return "the held-out text that ships with compress-llm"
    return Path(data).name if is_local(data) else data


def is_local(name: str) -> bool:
    """Whether a name in a recipe is that of a file or folder, and not of something on the Hub."""
    path = Path(name).expanduser()
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or path.suffix in LOCAL_SUFFIXES or path.exists()


def _loading(report: Mapping[str, Any], name: str) -> str:
    ours = f'With compress-llm, on its packed modules:\n\n```python\nimport compress\n\nmodel = compress.load("{name}")\n```'
    if report["format"] == PLAIN:
        return (
            "Every layer is an ordinary one; any tool that loads the base model loads it:\n\n```python\nfrom transformers import "
            f'AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("{name}")\n```'
        )
    if report["format"] != STANDARD:
        return (
            f"{ours}\n\nAfter `import compress`, `AutoModelForCausalLM.from_pretrained` loads it too. Without the package it "
            f"does not load: {report['format_reason']}."
        )
    argument = "" if report["symmetric"] else ", quantization_config=CompressedTensorsConfig(dequantize=True)"
    imports = "AutoModelForCausalLM" if report["symmetric"] else "AutoModelForCausalLM, CompressedTensorsConfig"
    stock = (
        f"With transformers and the compressed-tensors package:\n\n```python\nfrom transformers import {imports}\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}"{argument})\n```'
    )
    if not report["symmetric"]:
        stock += "\n\nThe grids are asymmetric: without `dequantize=True` stock transformers refuses the zero points."
    return f"{stock}\n\n{ours}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def mib(n: float) -> str:
    """ "7.88 MiB", "4.51 GiB": three digits."""
    size, unit = n / 2**20, "MiB"
    if size >= 1000:
        size, unit = size / 1024, "GiB"
    return f"{size:.{2 if size < 9.995 else 1 if size < 99.95 else 0}f} {unit}"
