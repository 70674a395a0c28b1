"""The sections of the page about quality, block by block and by benchmarks, and about speed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from compress.report import plots
from compress.report.figures import MISSING, Sheet, number, plot, table, token

FEW_BLOCKS = 12  # whose table is shown at once
ROLES = ("reference", "model")


def blocks(sheet: Sheet) -> str:
    """Which block hurts most."""
    f, at = sheet.f, f"{sheet.at}hidden_states"
    rows = f.get(f"{at}/blocks")
    if not rows:
        reason = f.get(f"{at}/reason")
        return f"<h2>Blocks</h2><p>No error by block: {escape(str(reason))}.</p>" if reason else ""
    worst, last = f.get(f"{at}/worst"), len(rows) - 1
    first = f"{at}/blocks/{worst[0]}"
    said = (
        f"Block {f(f'{first}/block', 'count')} does the most by itself: on the original's input it moves a token's hidden "
        f"state by {f(f'{first}/local_relative_error', 'share')} on average. Behind the last block the errors of all have "
        f"added up to {f(f'{at}/blocks/{last}/relative_error', 'share')}, at a mean cosine of "
        f"{f(f'{at}/blocks/{last}/cosine', 'cosine')} to the original."
    )
    if not rows[worst[0]]["local_relative_error"]:
        said = "No block changes anything: the hidden states are those of the original."
    strong = plots.strongest(worst)
    cells = [
        (
            f(f"{at}/blocks/{i}/block", "count"), f(f"{at}/blocks/{i}/local_relative_error", "share"),
            f(f"{at}/blocks/{i}/local_cosine", "cosine"), f(f"{at}/blocks/{i}/relative_error", "share"),
            f(f"{at}/blocks/{i}/cosine", "cosine"),
        )
        for i in range(len(rows))
    ]  # fmt: skip
    made = table(
        (">block", ">alone", ">cosine alone", ">added up", ">cosine added up"), cells, sortable=True,
        strong=[i for i in range(len(rows)) if i in strong],
    )  # fmt: skip
    opened = " open" if len(rows) <= FEW_BLOCKS else ""
    return (
        f"<h2>Which block hurts most</h2><p>{said}</p>{plot(plots.block_errors(rows, strong))}"
        f'<p class="sub">|difference| / |original| of the hidden states, mean over {f(f"{at}/tokens", "count")} tokens; '
        f"alone: the compressed block on the original's input, over {f(f'{at}/local_tokens', 'count')} of them.</p>"
        f"<details{opened}><summary>All {len(rows)} blocks</summary>{made}</details>"
    )


def benchmarks(sheet: Sheet) -> str:
    """Tasks of lm-eval, in its own form."""
    f, at = sheet.f, f"{sheet.at}tasks"
    if not f.has(f"{at}/model"):
        return ""
    found = f.get(at)
    compared = {(row["task"], row["metric"], row["filter"]): i for i, row in enumerate(found.get("comparison") or ())}
    drawn, rows = [], []
    for task, metric, filtered, key in _metrics(found["model"]):
        error = f"{metric}_stderr,{filtered}"
        results = {role: (found.get(role) or {}).get("results", {}).get(task, {}) for role in ROLES}
        name = f"{task} {metric}" + ("" if filtered == "none" else f" ({filtered})")
        of_roles = {role: number(results[role].get(key)) for role in ROLES}
        errors = {f"{role}_stderr": number(results[role].get(error)) for role in ROLES}
        drawn.append({"name": name, **of_roles, **errors})
        paths = [f"{at}/{role}/results/{token(task)}" for role in ROLES]
        cells = [
            f(f"{path}/{token(key)}", "score") + _plus_minus(f(f"{path}/{token(error)}", "score")) for path in paths
        ]
        row = f"{at}/comparison/{compared.get((task, metric, filtered))}"
        difference = f(f"{row}/difference", "signed") + _plus_minus(f(f"{row}/difference_stderr", "score"))
        rows.append((escape(name), *cells, difference, f(f"{row}/flips", "share")))
    columns: tuple[str, ...] = ("task and metric", ">original", ">this model", ">difference", ">answers changed")
    shown: list[tuple[str, ...]] = list(rows)
    said = "By lm-eval, with its standard errors; that of the difference is over the same questions."
    if not f.has(f"{at}/reference"):
        columns, shown = (columns[0], columns[2]), [(row[0], row[2]) for row in rows]
        said = "By lm-eval, with its standard errors."
    return f'<h2>Benchmarks</h2>{plot(plots.scores(drawn))}{table(columns, shown)}<p class="sub">{said}</p>'


def _plus_minus(error: str) -> str:
    return "" if error == MISSING else f" ± {error}"


def _metrics(results: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """(task, metric, filter, key) of every figure in results of lm-eval that is no standard error."""
    for task, scores in results["results"].items():
        for key, value in scores.items():
            metric, comma, filtered = key.partition(",")
            if comma and not metric.endswith("_stderr") and number(value) is not None:
                yield task, metric, filtered, key


MEMORY = {
    "load_seconds": ("time to load", "time"),
    "bytes_of_weight_files": ("weights on disk", "bytes"),
    "bytes_in_memory": ("weights in memory", "bytes"),
    "peak_resident_bytes": ("peak memory of the process", "bytes"),
    "resident_bytes_before": ("of that before loading", "bytes"),
    "peak_cuda_bytes": ("peak memory of the GPU", "bytes"),
}


def speed(sheet: Sheet) -> str:
    """Tokens per second and memory, with the original beside it where it was timed too."""
    f, at = sheet.f, f"{sheet.at}speed"
    if not f.has(at):
        return ""
    roles = [role for role in ROLES if f.has(f"{at}/{role}")]
    both = len(roles) == len(ROLES)
    rows: list[tuple[str, ...]] = []
    for phase in ("prefill", "decode"):
        paths = [f"{at}/{role}/{phase}" for role in roles]
        cells = [
            f"{f(f'{path}/tokens_per_second', 'rate')} [{f(f'{path}/min', 'rate')}–{f(f'{path}/max', 'rate')}]"
            for path in paths
        ]
        rows.append((f"{phase}, tokens per second", *cells, *([f(f"{at}/ratio/{phase}", "ratio")] if both else [])))
    for key, (name, form) in MEMORY.items():
        if f.get(f"{at}/model/{key}") is not None:
            ratio = [f.ratio(f"{at}/model/{key}", f"{at}/reference/{key}", "ratio")] if both else []
            rows.append((name, *(f(f"{at}/{role}/{key}", form) for role in roles), *ratio))
    columns = ("", ">original", ">this model", ">ratio") if both else ("", ">this model")
    machine = f"{at}/machine"
    return (
        f"<h2>Speed</h2>{table(columns, rows)}"
        f'<p class="sub">Prefill of {f(f"{at}/settings/prompt_tokens", "count")} tokens, decode of '
        f"{f(f'{at}/settings/new_tokens', 'count')}, batch {f(f'{at}/settings/batch_size', 'count')}; medians of "
        f"{f(f'{at}/settings/repeats', 'count')} rounds, the slowest and the quickest in brackets. "
        f"{f.text(f'{machine}/device')} ({f.text(f'{machine}/device_name')}), {f(f'{machine}/threads', 'count')} threads, "
        f"{f.text(f'{machine}/dtype')}, attention {f.text(f'{machine}/attention')}.</p>"
    )
