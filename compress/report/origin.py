"""The sections of the page about how a result was made, and how it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import yaml

from compress.report.figures import Sheet, pairs

MOST_NOTES = 400


def recipe(sheet: Sheet) -> str:
    if not sheet.f.has("recipe"):
        return ""
    written = yaml.safe_dump(_plain(sheet.report["recipe"]), sort_keys=False, allow_unicode=True, width=100)
    return f"<h2>Recipe</h2><pre>{escape(written)}</pre>"


def loading(sheet: Sheet) -> str:
    if not sheet.is_run:
        return ""
    ours = 'import compress\n\nmodel = compress.load("FOLDER")'
    said = f"<p>On the packed modules of this package:</p><pre>{escape(ours)}</pre>"
    if sheet.f.get("format") == "compressed-tensors":
        symmetric = sheet.f.get("symmetric") is not False
        argument = "" if symmetric else ", quantization_config=CompressedTensorsConfig(dequantize=True)"
        imports = "AutoModelForCausalLM" if symmetric else "AutoModelForCausalLM, CompressedTensorsConfig"
        stock = (
            f'from transformers import {imports}\n\nmodel = AutoModelForCausalLM.from_pretrained("FOLDER"{argument})'
        )
        said = f"<p>In stock transformers, with the package compressed-tensors:</p><pre>{escape(stock)}</pre>{said}"
    else:
        said += (
            f"<p>After <code>import compress</code>, <code>AutoModelForCausalLM.from_pretrained</code> loads it too. The format "
            f"is our own: {sheet.f.text('format_reason')}.</p>"
        )
    return f"<h2>How to load it</h2>{said}"


def costs(sheet: Sheet) -> str:
    f = sheet.f
    if not sheet.is_run:
        return ""
    phases = ", ".join(f"{escape(name)} {f(f'seconds/{name}', 'time')}" for name in sheet.report["seconds"])
    activities = sorted(sheet.report["activities"], key=lambda name: -sheet.report["activities"][name])
    spent = ", ".join(f"{escape(name)} {f(f'activities/{name}', 'time')}" for name in activities)
    rows = [
        ("time", f"{phases} (predicted for all: {f('predicted_seconds', 'time')})"),
        ("of compress", spent),
        ("peak memory", f"{f('peak_bytes', 'bytes')} (predicted {f('predicted_peak_bytes', 'bytes')})"),
        ("calibration", f"{f('calibration_tokens', 'count')} tokens"),
    ]
    if sheet.report.get("replayed_blocks"):
        rows.append(("resumed", f"{f('replayed_blocks', 'count')} blocks were finished before"))
    return f"<h2>What it cost</h2>{pairs(row for row in rows if row[1])}"


def versions(sheet: Sheet) -> str:
    f = sheet.f
    versions = f.get("versions") or {}
    rows = [(name, escape(str(version))) for name, version in versions.items()]
    machine = f.get("machine") or {}
    rows += [(str(name), escape(str(value))) for name, value in machine.items()]
    if sheet.is_run:
        rows += [
            ("model", f"<code>{f.text('model')}</code>"),
            ("recipe, hash", f"<code>{f.text('work/recipe')}</code>"),
        ]
        rows.append(("weights, hash", f"<code>{f.text('work/weights')}</code>"))
    notes = [str(n) for layer in sheet.report.get("layers", ()) for n in (layer.get("figures") or {}).get("notes", ())]
    distinct = list(dict.fromkeys(notes))
    said = "".join(f"<li>{escape(note)}</li>" for note in distinct[:MOST_NOTES])
    listed = f"<details><summary>{len(distinct)} notes</summary><ul>{said}</ul></details>" if said else ""
    return f"<h2>Versions</h2>{pairs(rows)}{listed}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
