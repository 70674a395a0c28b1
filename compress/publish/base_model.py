"""What the card of a result takes over from the card of the model that it was made from.

The licence above all: name and link stay with it, and the questions of a gated model. A card is YAML between two `---`
lines, then Markdown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag", "inference")
GATE = "extra_gated_"  # heading, prompt, fields, button: what a gated repository asks
# What tags say about the files of the base model, not about what it is; the Hub sets most of these by itself.
FORMAT_TAGS = re.compile(
    r"gguf|gptq|awq|exl[23]|mlx|onnx|bitsandbytes|compressed-tensors|safetensors|pytorch|transformers|\d+-?bit|[\w-]+:.*"
    r"|.*_compatible|text-generation-inference",
    re.IGNORECASE,
)
FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*\r?$\n?", re.DOTALL | re.MULTILINE)


def front_matter(card: str) -> dict[str, Any]:
    """The fields at the head of a card; none if there are none that can be read."""
    found = FRONT.match(card.removeprefix("\ufeff"))
    try:
        fields = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    return {str(key): value for key, value in fields.items()} if isinstance(fields, dict) else {}


def card_of(folder: Path) -> dict[str, Any]:
    """The fields of the card in a model's folder."""
    try:
        return front_matter((folder / "README.md").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}


def carried(fields: Mapping[str, Any], base: str | None, files: Mapping[str, Any] | set[str]) -> dict[str, Any]:
    """Those of the base model's fields that hold for a compressed copy too.

    Args:
        base: its id on the Hub.
        files: names of the result's files; a licence file that is not among them is linked to where it is.
    """
    kept = {key: fields[key] for key in CARRIED if fields.get(key) not in (None, "", [])}
    kept |= {key: value for key, value in fields.items() if key.startswith(GATE)}
    if isinstance(kept.get("license"), list):  # several: the Hub's form for a model is one
        kept["license"] = str(kept["license"][0]) if len(kept["license"]) == 1 else "other"
    link = kept.get("license_link")
    if isinstance(link, str) and not re.match(r"\w+://", link) and link not in files:
        if base:
            kept["license_link"] = f"https://huggingface.co/{base}/blob/main/{link.removeprefix('./')}"
        else:
            del kept["license_link"]
    tags = fields.get("tags")
    if isinstance(tags, list):
        kept["tags"] = [tag for tag in tags if isinstance(tag, str) and not FORMAT_TAGS.fullmatch(tag)]
    if (
        not base
        and isinstance(fields.get("base_model"), (str, list))
        and fields.get("base_model_relation") == "quantized"
    ):
        kept["base_model"] = fields["base_model"]  # a result of ours, compressed again
    return kept
