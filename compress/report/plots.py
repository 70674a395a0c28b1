"""The plots of the page, drawn by matplotlib as SVG that takes its colours and its font from the page around it.

matplotlib is imported when a plot is made, and only then. Each plot is made twice, for wide and for narrow screens: an SVG
that is scaled to a phone would have letters that nobody can read.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import log10
from typing import TYPE_CHECKING, Any

from compress.report.numbers import human_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that stand for a variable of the page's style sheet.
INK, MUTED, LINE, BEFORE, AFTER, STRONG = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", BEFORE: "before", AFTER: "after", STRONG: "strong"}
WIDE, NARROW = 9.6, 4.7  # inches; a point is a 72nd, and is about a pixel on the screen that it is meant for
FONT = {WIDE: 9.0, NARROW: 9.5}
NAME_LENGTH = {WIDE: 30, NARROW: 19}  # characters
MARKED = 48  # with more blocks than that a line goes without a mark for each
WORST = 3  # blocks that are drawn in the strong colour


@dataclass(frozen=True)
class Plot:
    """A plot for both kinds of screens, as inline SVG."""

    wide: str
    narrow: str


def draw(paint: Callable[[Figure, float], None], height: float, label: str) -> Plot:
    """Draw with `paint(figure, width)` on an empty figure of `height` inches, once for each width."""
    return Plot(*(_svg(paint, width, height, label) for width in (WIDE, NARROW)))


def _svg(paint: Callable[[Figure, float], None], width: float, height: float, label: str) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none", "svg.hashsalt": f"{label} {width}", "font.family": "DejaVu Sans", "font.size": FONT[width],
        "text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": LINE, "xtick.color": LINE, "ytick.color": LINE,
        "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED, "axes.labelsize": FONT[width], "xtick.labelsize": FONT[width],
        "ytick.labelsize": FONT[width], "legend.fontsize": FONT[width], "axes.spines.top": False, "axes.spines.right": False,
        "grid.color": LINE, "grid.linewidth": 0.5, "axes.axisbelow": True, "text.parse_math": False, "axes.facecolor": "none",
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), dpi=72, layout="constrained")
        figure.patch.set_visible(False)
        paint(figure, width)
        drawn = io.StringIO()
        FigureCanvasSVG(figure).print_svg(drawn, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(drawn.getvalue(), label)


def _inline(svg: str, label: str) -> str:
    """matplotlib's file as a part of a page: no prologue, no metadata, no names that two plots would share, our colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(?:xmlns(?::xlink)?|version|width|height)="[^"]*"', "", svg, count=5)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r"font-family:[^;\"]*;?\s*", "", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    for colour, name in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    shown = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{shown}"', 1)


def _legend(axes: Axes, columns: int) -> None:
    """Above the plot, where it covers nothing."""
    from matplotlib.container import Container

    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(handles)), key=lambda i: not isinstance(handles[i], Container))  # bars before lines
    axes.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=columns,
        frameon=False,
        borderaxespad=0.2,
        handlelength=1.2,
        columnspacing=1.4,
    )


def strongest(worst: Sequence[int]) -> set[int]:
    """The blocks to point at, of all in order from the worst on: a quarter, at most `WORST`."""
    return set(worst[: min(WORST, max(1, len(worst) // 4))])


def block_errors(blocks: Sequence[Mapping[str, Any]], strong: set[int]) -> Plot:
    """Bars: what each block does by itself, those of `strong` in another colour. Below, a line: what has added up so far."""
    from matplotlib.ticker import MaxNLocator

    numbers = [row["block"] for row in blocks]
    local = [100 * row["local_relative_error"] for row in blocks]
    total = [100 * row["relative_error"] for row in blocks]

    def paint(figure: Figure, width: float) -> None:
        alone, added_up = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        most, rest = (
            [i for i, number in enumerate(numbers) if (number in strong) == wanted] for wanted in (True, False)
        )
        worst = "the worst" if len(most) == 1 else f"the worst {len(most)}"
        for places, colour, label in ((rest, AFTER, "this block alone"), (most, STRONG, worst)):
            alone.bar([numbers[i] for i in places], [local[i] for i in places], 0.72, color=colour, label=label)
        marker = "o" if len(blocks) <= MARKED else ""
        added_up.plot(numbers, total, color=INK, linewidth=1.2, marker=marker, markersize=3, label="added up so far")
        for axes in (alone, added_up):
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
            axes.grid(axis="y")
            axes.tick_params(length=0)
            _legend(axes, 2)
        added_up.set_xlim(numbers[0] - 0.8, numbers[-1] + 0.8)
        added_up.xaxis.set_major_locator(MaxNLocator(nbins=12 if width == WIDE else 7, integer=True, min_n_ticks=1))
        added_up.set_xlabel("decoder block")
        figure.supylabel("relative error, %", color=MUTED, fontsize=FONT[width])

    return draw(paint, 3.9, "Relative error of hidden states by decoder block")


def block_scores(scores: Sequence[float | None], gone: Collection[int], name: str, level: float | None = None) -> Plot:
    """Bars: the score of each block, those that went in another colour. `level`: a line to compare them with."""
    from matplotlib.ticker import MaxNLocator

    known = [block for block, score in enumerate(scores) if score is not None]

    def paint(figure: Figure, width: float) -> None:
        axes = figure.subplots()
        for went, colour, label in ((False, AFTER, "stays"), (True, STRONG, "left out")):
            blocks = [block for block in known if (block in gone) == went]
            axes.bar(blocks, [scores[block] or 0.0 for block in blocks], 0.72, color=colour, label=label)
        if level is not None:
            axes.axhline(level, color=INK, linewidth=1.2, label="with all blocks")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.grid(axis="y")
        axes.set_xlim(-0.8, len(scores) - 0.2)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12 if width == WIDE else 7, integer=True, min_n_ticks=1))
        axes.set_xlabel("decoder block of the original")
        axes.tick_params(length=0)
        _legend(axes, 3)

    return draw(paint, 2.4, f"{name}, by decoder block")


def kind_bytes(kinds: Sequence[Mapping[str, Any]]) -> Plot:
    """Bars to the right: the bytes of all layers of a kind, before and after."""
    known = any(row["bytes_reference"] is not None for row in kinds)
    after = [row["bytes"] for row in kinds]
    before = [row["bytes_reference"] or 0 for row in kinds]
    most = max([*after, *before, 1])

    def paint(figure: Figure, width: float) -> None:
        axes = figure.subplots()
        places = range(len(kinds))
        thick = 0.38 if known else 0.66
        if known:
            axes.barh([y - thick / 2 for y in places], before, thick, color=BEFORE, label="original")
        axes.barh([y + (thick / 2 if known else 0) for y in places], after, thick, color=AFTER, label="this model")
        axes.set_yticks(places, [shortened(str(row["kind"]), width) for row in kinds])
        axes.set_ylim(len(kinds) - 0.4, -0.6)
        axes.set_xlim(0, most)
        beside = axes.secondary_yaxis("right")
        beside.set_yticks(places, [_change(row) for row in kinds])
        beside.tick_params(length=0)
        beside.spines["right"].set_visible(False)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(length=0)
        if known:
            _legend(axes, 2)

    return draw(paint, 0.75 + 0.36 * len(kinds), "Bytes by kind of layer, before and after")


def _change(row: Mapping[str, Any]) -> str:
    was, now = row["bytes_reference"], human_bytes(row["bytes"])
    return now if was is None else f"{human_bytes(was)} → {now}"


def layer_errors(errors: Mapping[str, Mapping[int, float]]) -> Plot:
    """A square for each kind of layer (row) and block (column): the stronger, the larger its error, on a logarithmic scale.

    Args:
        errors: kind -> block -> error of the layer's output; at least one is positive.
    """
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    values = [value for row in errors.values() for value in row.values() if value > 0]
    low, high = log10(min(values)), log10(max(values))
    blocks = {block for row in errors.values() for block in row}

    def paint(figure: Figure, width: float) -> None:
        axes = figure.subplots()
        for y, row in enumerate(errors.values()):
            for block, value in row.items():
                depth = (log10(value) - low) / (high - low) if value > 0 and high > low else 0.0 if value <= 0 else 1.0
                strength = 0.07 + 0.93 * depth
                axes.add_patch(
                    Rectangle((block - 0.46, y - 0.44), 0.92, 0.88, color=STRONG, alpha=strength, linewidth=0)
                )
        axes.set_xlim(min(blocks) - 0.6, max(blocks) + 0.6)
        axes.set_ylim(len(errors) - 0.4, -0.6)
        axes.set_yticks(range(len(errors)), [shortened(kind, width) for kind in errors])
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12 if width == WIDE else 7, integer=True, min_n_ticks=1))
        axes.set_xlabel("decoder block")
        axes.tick_params(length=0)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)

    return draw(paint, 0.6 + 0.24 * len(errors), "Error of each layer's output, by kind of layer and block")


def scores(rows: Sequence[Mapping[str, Any]]) -> Plot:
    """Dots with one standard error to each side: benchmarks of the model and, where there is one, of the original.

    Args:
        rows: each with "name", "model", "model_stderr", "reference", "reference_stderr"; None where not known.
    """
    known = any(row["reference"] is not None for row in rows)

    def paint(figure: Figure, width: float) -> None:
        axes = figure.subplots()
        shown = [("reference", BEFORE, -0.14, "original")] if known else []
        for role, colour, shift, label in [*shown, ("model", AFTER, 0.14 if known else 0.0, "this model")]:
            points = [(y, row) for y, row in enumerate(rows) if row[role] is not None]
            axes.errorbar(
                [row[role] for _, row in points], [y + shift for y, _ in points],
                xerr=[row[f"{role}_stderr"] or 0.0 for _, row in points], fmt="o", markersize=4.5, elinewidth=1.5,
                color=colour, label=label,
            )  # fmt: skip
        axes.set_yticks(range(len(rows)), [shortened(str(row["name"]), width) for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="x")
        axes.tick_params(length=0)
        _legend(axes, 2)

    return draw(paint, 0.9 + 0.34 * len(rows), "Benchmarks with standard errors")


def shortened(name: str, width: float) -> str:
    """A name that fits beside a plot: the middle of a long one is left out."""
    length = NAME_LENGTH[width]
    if len(name) <= length:
        return name
    half = (length - 1) // 2
    return f"{name[:half]}…{name[-half:]}"
