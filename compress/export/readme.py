"""The README.md of an export: the source's card, if it has one, with how it was exported and how to load it now."""

from __future__ import annotations

from typing import Any

import yaml

from compress.export.formats import FORMATS, Format, Model
from compress.publish.base_model import FRONT, front_matter

LOADING = "## Loading"
SERVED = "Servers such as vLLM and SGLang take the folder as it is. In Python, with `pip install {package}`:\n\n"
GPTQMODEL = SERVED.format(package="gptqmodel") + (
    '```python\nfrom gptqmodel import GPTQModel\n\nmodel = GPTQModel.load("FOLDER_OR_ID")\n```\n'
)
TRANSFORMERS = (
    "```python\nfrom transformers import {imports}\n\n"
    'model = AutoModelForCausalLM.from_pretrained("FOLDER_OR_ID"{argument})\n```\n'
)
OURS = (
    "With compress-llm, on its packed modules and with the checksums of `compress_export.json` checked:\n\n"
    '```python\nimport compress\n\nmodel = compress.load("FOLDER_OR_ID")\n```\n'
)


def readme(model: Model, format_: Format) -> str:
    """A model card in the Hub's form."""
    front, body = _source_card(model)
    tags = [tag for tag in front.get("tags") or [] if tag not in (*FORMATS, "compress-llm", "compress")]
    front["tags"] = ["compress-llm", format_.name, *tags]
    front.setdefault("library_name", "transformers")
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()
    layers = f"{len(model.specs)} compressed layers"
    symmetric = all(getattr(spec, "symmetric", True) for spec in model.specs.values())
    if format_.name in ("gptq", "awq"):
        loading = GPTQMODEL
    elif format_.name == "dense":
        plain = TRANSFORMERS.format(imports="AutoModelForCausalLM", argument="")
        loading = f"Weights are plain; whatever loads the original loads this model:\n\n{plain}"
    else:
        argument = "" if symmetric else ", quantization_config=CompressedTensorsConfig(dequantize=True)"
        imports = "AutoModelForCausalLM" if symmetric else "AutoModelForCausalLM, CompressedTensorsConfig"
        loading = SERVED.format(package="compressed-tensors") + TRANSFORMERS.format(imports=imports, argument=argument)
    exported = f"Exported by `compress-llm` to the format {format_.name} from `{model.folder.name}` ({layers})."
    return f"---\n{head}\n---\n\n{body}{exported}\n\n{LOADING}\n\n{loading}\n{OURS}"


def _source_card(model: Model) -> tuple[dict[str, Any], str]:
    """Front matter and text of the source's README.md, up to how it was loaded."""
    try:
        card = (model.folder / "README.md").read_text(encoding="utf-8").removeprefix("\ufeff")
    except (OSError, UnicodeDecodeError):
        card = ""
    body = FRONT.sub("", card).partition(LOADING)[0].strip()
    return front_matter(card), f"{body}\n\n" if body else f"# {model.folder.name}\n\n"
