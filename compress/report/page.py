"""The page of a report: one HTML file that loads nothing from anywhere.

Takes the report of a run, or what `compress eval --json` prints; sections for which it has no figures are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import Any

from compress.report.contents import layers, sizes
from compress.report.figures import Sheet
from compress.report.origin import costs, loading, recipe, versions
from compress.report.quality import benchmarks, blocks, speed
from compress.report.rewrites import rewrites

SECTIONS = (rewrites, blocks, benchmarks, speed, sizes, layers, recipe, loading, costs, versions)


def page(report: Mapping[str, Any]) -> str:
    """The whole file. Raises: ImportError if matplotlib is not installed."""
    sheet = Sheet(report)
    name = escape(title(sheet))
    parts = [head(sheet), cards(sheet), warnings(sheet), *(section(sheet) for section in SECTIONS)]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n<style>\n{_resource('style.css')}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f"<script>\n{_resource('sort.js')}</script>\n</body>\n</html>\n"
    )


def _resource(name: str) -> str:
    return files("compress.report").joinpath(name).read_text(encoding="utf-8")


def title(sheet: Sheet) -> str:
    if not sheet.is_run:
        path = str(sheet.f.get("model/path") or sheet.f.get("size/model/path") or "a model")
        return f"{path.rstrip('/').rpartition('/')[2]}, measured"
    base = sheet.f.get("base/title") or str(sheet.f.get("model")).rstrip("/").rpartition("/")[2]
    return f"{base}, compressed"


def head(sheet: Sheet) -> str:
    f = sheet.f
    if sheet.is_run:
        listed = sheet.report["layers"]
        done = [str(step["method"]) for step in f.get("rewrites") or ()]
        if listed:
            done.append(f"{' and '.join(sorted({str(layer['method']) for layer in listed}))} on {len(listed)} layers")
        if f.get("tuning"):
            done.append(f"{f.get('tuning/method')} on the whole")
        said = (
            f"{f('n_blocks', 'count')} decoder blocks ({f.text('family')}), {escape(', then '.join(done) or 'copied')}, stored "
            f"as {f.text('format')}"
        )
    else:
        said = f"<code>{f.text('model/path')}</code>"
        if f.has("reference/path"):
            said += f" beside <code>{f.text('reference/path')}</code>"
    return f'<header><h1>{escape(title(sheet))}</h1><p class="sub">{said} · {_when(sheet)}</p></header>'


def _when(sheet: Sheet) -> str:
    """ "2026-11-21 12:53 UTC", to the minute."""
    date, _, time = str(sheet.f.get("created") or "").partition("T")
    return escape(f"{date} {time[:5]} UTC")


def cards(sheet: Sheet) -> str:
    f, at = sheet.f, sheet.at
    cards = []

    def card(what: str, big: str, beside: str) -> None:
        cards.append(
            f'<div class="card"><div class="what">{what}</div><div class="big">{big}</div>'
            f'<div class="beside">{beside}</div></div>'
        )

    model, reference = "size/model/bytes_tensors", "size/reference/bytes_tensors"
    if f.has(model):
        was = f"from {f(reference, 'bytes')}, {f.ratio(model, reference)}" if f.has(reference) else "all tensors"
        card("Size of the weights", f(model, "bytes"), was)
    if sheet.is_run and f.get("layers"):
        card(
            "Bits per weight", f("bits_per_weight", "bits"),
            f"replaced layers: {f('bytes_after', 'bytes')}, {f.ratio('bytes_after', 'bytes_before')}",
        )  # fmt: skip
    if f.has(f"{at}model/perplexity"):
        beside = (
            f"original {f(f'{at}reference/perplexity', 'perplexity')}" if f.has(f"{at}reference/perplexity") else ""
        )
        card("Perplexity per token", f(f"{at}model/perplexity", "perplexity"), beside)
    if f.has(f"{at}fidelity"):
        card(
            "KL to the original", f"{f(f'{at}fidelity/kl_mean', 'small')}",
            f"nats, mean; 99th percentile {f(f'{at}fidelity/kl_p99', 'small')}",
        )  # fmt: skip
        card(
            "Top-1 agreement", f(f"{at}fidelity/top1_agreement", "share"),
            f"of {f(f'{at}fidelity/positions', 'count')} positions",
        )  # fmt: skip
    if f.has(f"{at}speed/model/decode"):
        card(
            "Decode, tokens per second",
            f(f"{at}speed/model/decode/tokens_per_second", "rate"),
            _beside_speed(sheet),
        )
    return f'<div class="cards">{"".join(cards)}</div>{_text(sheet)}'


def _beside_speed(sheet: Sheet) -> str:
    there = f"{sheet.at}speed/reference/decode/tokens_per_second"
    return f"original {sheet.f(there, 'rate')}" if sheet.f.has(there) else "no original beside it"


def _text(sheet: Sheet) -> str:
    f, at = sheet.f, sheet.at
    if not f.has(f"{at}text"):
        return ""
    data = escape(", ".join(map(str, f.get(f"{at}text/data"))))
    return (
        f'<p class="sub">Perplexity over {f(f"{at}model/scored_tokens", "count")} tokens of {data} in '
        f"{f(f'{at}text/windows', 'count')} windows of {f(f'{at}text/length', 'count')}, "
        f"{f(f'{at}text/stride', 'count')} apart, {'begins with BOS' if f.get(f'{at}text/begins_with_bos') else 'no BOS'}; "
        f"bits per byte of text {f(f'{at}model/bits_per_byte', 'score')}"
        + (f", original {f(f'{at}reference/bits_per_byte', 'score')}" if f.has(f"{at}reference") else "")
        + ".</p>"
    )


def warnings(sheet: Sheet) -> str:
    said = [str(text) for text in sheet.f.get("warnings") or ()]
    return "".join(f'<p class="warning">{escape(text)}</p>' for text in said)
