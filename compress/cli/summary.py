"""What a run has come to, as a table: bytes, quality, time, memory, and where everything is."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.cli.bench import described_machine
from compress.cli.blocks import block_rows
from compress.cli.scores import task_rows
from compress.cli.show import (
    human_bytes,
    human_time,
    note,
    once_each,
    out,
    pairs,
    percent,
    show,
    table,
)
from compress.pipeline.output import PAGE, REPORT
from compress.report.numbers import rate

PROMPT = "It was a dark night"


def print_report(
    report: dict[str, Any],
    folder: Path,
    already_finished: bool,
    notes: Sequence[str],
    evaluated_again: bool = False,
) -> None:
    """Print the report of a run on stdout; warnings and notes once more on stderr."""
    if evaluated_again:
        out(f"{folder} was complete already: only measured again, as the recipe now says. Its new report:\n")
    elif already_finished:
        out(f"{folder} was complete already: nothing was done. Its report:\n")
    show(table(("", ">before", ">after", ">after / before", ""), [*_sizes(report), *_quality(report)]))
    out("")
    show(pairs([*_rewritten(report), *_tuning(report), *_fidelity(report), *_costs(report), *_places(report, folder)]))
    recorded = [f"{layer['name']}: {n}" for layer in report["layers"] for n in layer["figures"].get("notes", ())]
    said = once_each([f"warning: {w}" for w in report["warnings"]] + [f"note: {n}" for n in [*notes, *recorded]])
    for line in said:
        note(line)


def _sizes(report: dict[str, Any]) -> list[tuple[str, ...]]:
    before, after = report["bytes_before"], report["bytes_after"]
    bits = f"{report['bits_per_weight']:.3f} bits per weight"
    rows: list[tuple[str, ...]] = []
    if report["layers"]:
        rows.append((f"{len(report['layers'])} replaced layers", *_change(before, after), bits))
    rows.append(("all tensors", *_change(report["bytes_total_before"], report["bytes_total_after"]), ""))
    if report["bytes_on_disk_source"]:
        n_files = f"{len(report['files'])} files, as counted on disk"
        rows.append(("all files", *_change(report["bytes_on_disk_source"], report["bytes_on_disk_all"]), n_files))
    else:
        rows.append(("all files", "–", human_bytes(report["bytes_on_disk_all"]), "–", "as counted on disk"))
    if "size" in report:
        theirs, ours = (report["size"][role]["bytes_in_memory"] for role in ("reference", "model"))
        rows.append(("in memory", *_change(theirs, ours), "weights, when loaded"))
    return rows


def _rewritten(report: dict[str, Any]) -> list[tuple[str, str]]:
    return [("rewritten", f"{step['method']}: {step['note']}") for step in report.get("rewrites", ())]


def _tuning(report: dict[str, Any]) -> list[tuple[str, str]]:
    tuning = report.get("tuning")
    if not tuning:
        return []
    figures = tuning["figures"]
    if not figures.get("kept"):
        return [("tuned", f"{tuning['method']}: nothing better was found; as it was before")]
    change = f"{figures['divergence_start']:.5f} -> {figures['divergence']:.5f}"
    return [("tuned", f"{tuning['method']}: KL of rows set aside {change}, {tuning['iterations']} iterations")]


def _change(before: float, after: float) -> tuple[str, str, str]:
    return human_bytes(before), human_bytes(after), percent(after, before)


def _quality(report: dict[str, Any]) -> list[tuple[str, ...]]:
    evaluation = report["evaluation"]
    if not evaluation:
        return []
    before, after = evaluation["reference"], evaluation["model"]
    rows: list[tuple[str, ...]] = []
    for key, name, where in (
        ("perplexity", "perplexity per token", described(evaluation)),
        ("bits_per_byte", "bits per byte of text", ""),
    ):
        rows.append((name, f"{before[key]:.4f}", f"{after[key]:.4f}", percent(after[key], before[key]), where))
    if "speed" in evaluation:
        rows += _speed(evaluation["speed"])
    return [*rows, *(task_rows(evaluation["tasks"]) if "tasks" in evaluation else ())]


def _speed(speed: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for phase in ("prefill", "decode"):
        theirs, ours = (rate(speed[role][phase]["tokens_per_second"]) for role in ("reference", "model"))
        where = described_machine(speed["machine"]) if phase == "prefill" else ""
        rows.append((f"{phase}, tokens/s", theirs, ours, f"{100 * speed['ratio'][phase]:.1f} %", where))
    return rows


def described(evaluation: dict[str, Any]) -> str:
    """What a perplexity was measured on."""
    text = evaluation["text"]
    overlap = "" if text["stride"] == text["length"] else f" every {text['stride']}"
    bos = "begins with BOS" if text["begins_with_bos"] else "no BOS"
    return (
        f"{evaluation['model']['scored_tokens']:,} tokens of {', '.join(text['data'])} in {text['windows']:,} windows of "
        f"{text['length']:,}{overlap}, {bos}"
    )


def _fidelity(report: dict[str, Any]) -> list[tuple[str, str]]:
    fidelity = report["evaluation"].get("fidelity") if report["evaluation"] else None
    if not fidelity:
        return []
    blocks = report["evaluation"].get("hidden_states")
    return [*fidelity_rows(fidelity), *(block_rows(blocks) if blocks else ())]


def fidelity_rows(fidelity: dict[str, float]) -> list[tuple[str, str]]:
    return [
        ("KL to the original", f"mean {fidelity['kl_mean']:.5f}, 99th percentile {fidelity['kl_p99']:.4f} nats"),
        ("top-1 agreement", f"{100 * fidelity['top1_agreement']:.2f} % of {fidelity['positions']:,.0f} positions"),
    ]


def _costs(report: dict[str, Any]) -> list[tuple[str, str]]:
    seconds, predicted = report["seconds"], report["predicted_seconds"]
    phases = ", ".join(f"{name} {human_time(value)}" for name, value in seconds.items() if value >= 0.01)
    rows = [("time", f"{human_time(sum(seconds.values()))} (predicted {human_time(predicted)}): {phases}")]
    activities = sorted(report["activities"].items(), key=lambda item: -item[1])
    spent = ", ".join(f"{name} {human_time(value)}" for name, value in activities if value >= 0.01)
    if spent:
        rows.append(("of compress", spent))
    if report["replayed_blocks"]:
        rows.append(("resumed", f"{report['replayed_blocks']} of {report['n_blocks']} blocks were finished before"))
    peak, expected = report["peak_bytes"], report["predicted_peak_bytes"]
    rows.append(("peak memory", f"{human_bytes(peak)} (predicted {human_bytes(expected)})"))
    return rows


def _places(report: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    return [
        ("format", f"{report['format']}: {report['format_reason']}"),
        ("report", str(folder / REPORT) + (f", as a page: {PAGE}" if (folder / PAGE).is_file() else "")),
        ("result", str(folder)),
        ("try next", shlex.join(["compress", "generate", str(folder), "--prompt", PROMPT])),
    ]
