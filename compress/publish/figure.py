"""The figure of a model card: what compression cost each layer, block by block, as a PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

MEASURE = "relative_error"  # of the layer's output on the calibration inputs, squared norms


def card_figure(report: Mapping[str, Any]) -> bytes | None:
    """A line for each kind of layer over the blocks. None if fewer than two blocks were measured, or nothing can draw."""
    lines: dict[str, dict[int, list[float]]] = {}
    for layer in report["layers"]:
        error = (layer.get("figures") or {}).get(MEASURE)
        if layer["block"] is not None and isinstance(error, int | float) and error > 0:
            kind = layer["name"].rsplit(".", 1)[-1]
            lines.setdefault(kind, {}).setdefault(layer["block"], []).append(error)  # experts of a block: their mean
    blocks = {block for line in lines.values() for block in line}
    if len(blocks) < 2:
        return None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return None
    figure = Figure(figsize=(7.5, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for kind, line in lines.items():
        points = sorted((block, sum(errors) / len(errors)) for block, errors in line.items())
        axes.plot([b for b, _ in points], [e for _, e in points], marker="o", markersize=3, linewidth=1.2, label=kind)
    axes.set_yscale("log")
    axes.set_xlabel("decoder block")
    axes.set_ylabel("relative error of the output")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image, metadata={"Software": None})
    return image.getvalue()
