"""The sections of the page about bytes, and about every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from compress.report import plots
from compress.report.figures import Sheet, number, plot, table

MOST_LAYERS = 400  # rows of the table of layers; of more, those with the largest errors
FEW_LAYERS = 14  # whose table is shown at once
TOTALS = {
    "bytes_on_disk": "all files on disk", "bytes_tensors": "all tensors", "bytes_in_memory": "in memory, when loaded",
}  # fmt: skip


def sizes(sheet: Sheet) -> str:
    """On disk, in memory, and by kind of layer."""
    f = sheet.f
    kinds = f.get("size/kinds")
    if not kinds:
        return ""
    known = f.has("size/reference")
    columns = (">original", ">this model", ">share") if known else (">this model",)

    def cells(model: str, reference: str) -> tuple[str, ...]:
        return (f(reference, "bytes"), f(model, "bytes"), f.ratio(model, reference)) if known else (f(model, "bytes"),)

    totals = [(name, *cells(f"size/model/{key}", f"size/reference/{key}")) for key, name in TOTALS.items()]
    of_kinds = [
        (
            f.text(f"size/kinds/{i}/kind"), f(f"size/kinds/{i}/layers", "count"),
            *cells(f"size/kinds/{i}/bytes", f"size/kinds/{i}/bytes_reference"),
        )
        for i in range(len(kinds))
    ]  # fmt: skip
    return (
        f"<h2>Bytes</h2>{table(('', *columns), totals)}{plot(plots.kind_bytes(kinds))}<details><summary>The same as a table"
        f"</summary>{table(('kind of layer', '>layers', *columns), of_kinds, sortable=True)}</details>"
    )


def layers(sheet: Sheet) -> str:
    """What became of each layer."""
    if sheet.is_run:
        return _of_run(sheet) if sheet.report["layers"] else ""
    return _of_evaluation(sheet)


def _of_run(sheet: Sheet) -> str:
    f, listed = sheet.f, sheet.report["layers"]
    errors = [number((layer.get("figures") or {}).get("relative_error")) for layer in listed]
    order = sorted(range(len(listed)), key=lambda i: -(errors[i] or 0.0))
    known = [i for i in order if errors[i]]
    drawn = ""
    if known:
        paths = [f"layers/{i}/figures/relative_error" for i in (known[0], known[-1])]
        drawn = (
            f"<p>The stronger the colour, the larger the error of the layer's output on the calibration inputs, squared and "
            f"relative, on a logarithmic scale. The largest is {f(paths[0], 'small')} "
            f"(<code>{f.text(f'layers/{known[0]}/name')}</code>), the smallest {f(paths[1], 'small')}.</p>"
            f"{_map(listed, errors)}"
        )
    rows = [
        (
            f"<code>{f.text(f'layers/{i}/name')}</code>", f.text(f"layers/{i}/method"), escape(_described(listed[i]["spec"])),
            f(f"layers/{i}/bytes_before", "bytes"), f(f"layers/{i}/bytes_after", "bytes"),
            f(f"layers/{i}/bits_per_weight", "bits"), f(f"layers/{i}/figures/loss", "small"),
            f(f"layers/{i}/figures/relative_error", "small"),
        )
        for i in (order[:MOST_LAYERS] if len(order) > MOST_LAYERS else range(len(listed)))
    ]  # fmt: skip
    columns = ("layer", "method", "stored as", ">before", ">after", ">bits per weight", ">loss", ">relative error")
    return f"<h2>Layers</h2>{drawn}{_folded(columns, rows, len(listed), 'with the largest errors')}"


def _map(listed: Sequence[Mapping[str, Any]], errors: Sequence[float | None]) -> str:
    """Kinds of layers by blocks; where a block has several of a kind (experts), their mean."""
    found: dict[str, dict[int, list[float]]] = {}
    for layer, error in zip(listed, errors, strict=True):
        if layer["block"] is not None and error is not None:
            found.setdefault(layer["name"].rpartition(".")[2], {}).setdefault(layer["block"], []).append(error)
    means = {kind: {block: sum(v) / len(v) for block, v in row.items()} for kind, row in found.items()}
    return plot(plots.layer_errors(means)) if any(v > 0 for row in means.values() for v in row.values()) else ""


def _of_evaluation(sheet: Sheet) -> str:
    f = sheet.f
    listed = f.get("size/layers")
    if not listed:
        return ""
    order = sorted(range(len(listed)), key=lambda i: -listed[i]["bytes"])[:MOST_LAYERS]
    rows = [
        (
            f"<code>{f.text(f'size/layers/{i}/name')}</code>", f(f"size/layers/{i}/bytes_reference", "bytes"),
            f(f"size/layers/{i}/bytes", "bytes"), f(f"size/layers/{i}/bits_per_weight", "bits"),
        )
        for i in sorted(order)
    ]  # fmt: skip
    return f"<h2>Layers</h2>{_folded(('layer', '>original', '>this model', '>bits per weight'), rows, len(listed), 'largest')}"


def _folded(columns: Sequence[str], rows: Sequence[Sequence[str]], n_all: int, which: str) -> str:
    opened = " open" if len(rows) <= FEW_LAYERS else ""
    left_out = "" if len(rows) == n_all else f"The {len(rows):,} {which} of {n_all:,}; the others are in the JSON. "
    said = f"{left_out}Table of {len(rows):,} layers; a click on a heading sorts it"
    return f"<details{opened}><summary>{said}</summary>{table(columns, rows, sortable=True)}</details>"


def _described(spec: Mapping[str, Any]) -> str:
    """ "quantized, bits 4, group_size 64": what differs from layer to layer of a kind."""
    left_out = ("representation", "in_features", "out_features", "kind")
    said = [f"{key} {value}" for key, value in spec.items() if key not in left_out and value not in (None, True)]
    return ", ".join([str(spec.get("representation", "")), *said])
