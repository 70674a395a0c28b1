"""The report of a run: everything that was planned and measured, as JSON beside the result, and as a page to look at.

The JSON comes first and is what marks a run as finished; the page is made from it, now or later.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.pipeline.output import PAGE, REPORT
from compress.report.frame import frame

if TYPE_CHECKING:
    from compress.pipeline.meter import Meter
    from compress.pipeline.plan import Plan
    from compress.pipeline.progress import Progress


def build_report(
    planned: Plan,
    folder: Path,
    header: dict[str, Any],
    details: dict[str, Any],
    evaluation: dict[str, Any],
    meter: Meter,
    names: list[str],
) -> dict[str, Any]:
    """For the table, for `--json`, for programs and the page; docs/report.schema.json describes it. `names`: our files."""
    content = planned.to_dict()
    for layer in content["layers"]:
        layer["figures"] = details["layers"].get(layer["name"], {})
    source_bytes = (
        sum(f.stat().st_size for f in planned.source.folder.iterdir() if f.is_file()) if planned.source.folder else None
    )
    return {
        **frame("run"),
        "work": header,
        "out": str(folder),
        **content,
        "recipe": planned.recipe.to_dict(),
        **file_sizes(folder, names),
        "bytes_on_disk_source": source_bytes,
        "size": _sizes(folder, planned, names),
        "seconds": {name: round(value, 3) for name, value in meter.seconds.items()},
        "activities": {name: round(value, 3) for name, value in details["activities"].items()},
        "peak_bytes": meter.peak_bytes,
        "peaks": dict(meter.peaks),
        "replayed_blocks": details.get("replayed_blocks", 0),
        "tuning": content["tuning"] and {**content["tuning"], "figures": details.get("tuning") or {}},
        "calibration_tokens": details.get("calibration_tokens", 0),
        "evaluation": evaluation,
    }


def file_sizes(folder: Path, names: list[str]) -> dict[str, Any]:
    """Bytes of the files of a result, as counted on disk."""
    files = {name: (folder / name).stat().st_size for name in names if (folder / name).is_file()}
    weights = sum(size for name, size in files.items() if name.endswith(".safetensors"))
    return {"files": files, "bytes_on_disk_weights": weights, "bytes_on_disk_all": sum(files.values())}


def _sizes(folder: Path, planned: Plan, names: list[str]) -> dict[str, Any]:
    from compress.checkpoint.source import find_source
    from compress.evaluation.size import sizes

    found = sizes(find_source(str(folder)), planned.original)
    found["model"]["bytes_on_disk"] = file_sizes(folder, names)["bytes_on_disk_all"]  # whatever else lies there
    return found


def evaluation_differs(planned: Plan, stored: dict[str, Any]) -> bool:
    """Whether the recipe asks for measurements that a finished run's report does not hold.

    A recipe without an evaluation asks for nothing: what was measured before is left as it is.
    """
    wanted = planned.recipe.to_dict().get("evaluation")
    return wanted is not None and (stored.get("recipe") or {}).get("evaluation") != wanted


def measured_again(
    planned: Plan, folder: Path, stored: dict[str, Any], evaluation: dict[str, Any], meter: Meter
) -> dict[str, Any]:
    """The report of a finished run with another evaluation. What compressing cost stays as it was measured then."""
    from compress.checkpoint.writer import write_text

    write_text(folder / "recipe.yaml", planned.recipe.to_yaml())
    peaks = {**stored["peaks"], "evaluate": meter.peaks["evaluate"]}
    return {
        **stored,
        **frame("run"),
        "recipe": planned.recipe.to_dict(),
        **file_sizes(folder, list(stored["files"])),
        "size": _sizes(folder, planned, list(stored["files"])),
        "seconds": {**stored["seconds"], "evaluate": round(meter.seconds["evaluate"], 3)},
        "peaks": peaks,
        "peak_bytes": max(peaks.values()),
        "evaluation": evaluation,
    }


def write_report(folder: Path, report: dict[str, Any], progress: Progress) -> None:
    """Write JSON and page. Raises: CheckpointError if the JSON cannot be written."""
    from compress.checkpoint.writer import write_json

    write_json(folder / REPORT, report)
    write_page_of(folder, report, progress)


def write_page_of(folder: Path, report: dict[str, Any], progress: Progress) -> None:
    """Write the page, or note why there is none."""
    try:
        from compress.report.write import write_page

        write_page(report, folder / PAGE)
    except Exception as error:  # the result is whole: a plotting library, or one that is missing, must not fail the run
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        progress.note(f"{PAGE} was not made ({reason:.200}); make it with: compress report {folder}")
