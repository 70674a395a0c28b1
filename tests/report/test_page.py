"""The page: well-formed, loads nothing, and says what the JSON says."""

from __future__ import annotations

import copy
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from compress.errors import CheckpointError
from compress.evaluation.blocks import not_comparable
from compress.evaluation.evaluate import evaluate
from compress.pipeline.run import run
from compress.recipe import Evaluation
from compress.report.numbers import human_time
from compress.report.page import page
from compress.report.schema import json_schema
from compress.report.write import write_page
from tests.runs import recipe_for
from tests.tiny_models import save_tiny

pytestmark = pytest.mark.usefixtures("drawn")

VOID = {"meta", "br", "link", "img", "input", "hr"}
UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "%": 0.01, "s": 1}


class Reader(HTMLParser):
    """Takes a page apart; anything that a browser would have to mend is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.figures: list[tuple[str, str | None, str]] = []  # (pointer, pointer of the divisor, text)
        self.words: list[str] = []
        self._figure: tuple[str, str | None] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        given = dict(attrs)
        if "data-json" in given:
            self._figure = (str(given["data-json"]), given.get("data-per"))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self._figure is not None:
            self.figures.append((*self._figure, data))
            self._figure = None


def read(made: str) -> Reader:
    reader = Reader()
    reader.feed(made)
    reader.close()
    assert reader.open == []
    return reader


def resolve(report: Any, pointer: str) -> Any:
    """RFC 6901."""
    found = report
    for part in pointer.removeprefix("/").split("/"):
        part = part.replace("~1", "/").replace("~0", "~")
        found = found[int(part)] if isinstance(found, list) else found[part]
    return found


def figure_of(text: str) -> tuple[float, float]:
    """(value, half of the last digit) of what is written: "12.1 MiB", "93.3 %", "47,685", "7.98e-05"."""
    number, _, unit = text.replace(",", "").partition(" ")
    mantissa, _, exponent = number.partition("e")
    scale = UNITS[unit] if unit else 1.0
    decimals = len(mantissa.partition(".")[2])
    digit = 10.0 ** (int(exponent or 0) - decimals)
    return float(number) * scale, 0.5000001 * digit * scale


@pytest.fixture(scope="module")
def report(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a run; the tests change copies of it."""
    source = save_tiny("llama_gqa_tied", tmp_path_factory.mktemp("models") / "model")
    recipe = recipe_for(source, [{"gptq": {"bits": 3, "group_size": 32, "symmetric": False}}], text)
    return run(recipe, tmp_path_factory.mktemp("out") / "result").report


def results_of(**scores: float) -> dict[str, Any]:
    return {
        "results": {"a/task.with_dots": {"alias": "a task", **{k.replace("__", ","): v for k, v in scores.items()}}}
    }


TASKS = {
    "model": results_of(acc__none=0.5125, acc_stderr__none=0.0123, acc_norm__none=0.25, acc_norm_stderr__none=0.01),
    "reference": results_of(acc__none=0.53, acc_stderr__none=0.012, acc_norm__none=0.25, acc_norm_stderr__none=0.01),
    "comparison": [
        {"task": "a/task.with_dots", "metric": "acc", "filter": "none", "model": 0.5125, "reference": 0.53,
         "difference": -0.0175, "difference_stderr": 0.004, "flips": 0.0425},
    ],
}  # fmt: skip
RATE = {"tokens_per_second": 52.5, "min": 31.875, "max": 176.7, "rounds": [52.5, 31.875, 176.7]}
TIMED = {
    "path": "a", "load_seconds": 11.25, "bytes_in_memory": 6_395_040, "bytes_of_weight_files": 6_410_448,
    "peak_resident_bytes": 435_000_000, "resident_bytes_before": 260_000_000, "peak_cuda_bytes": None, "prefill": RATE,
    "decode": RATE,
}  # fmt: skip
SPEED = {
    "settings": {"prompt_tokens": 192, "new_tokens": 64, "batch_size": 1, "repeats": 3},
    "machine": {"device": "cpu", "device_name": "a <CPU>", "threads": 2, "torch": "2", "dtype": "float32", "attention": "sdpa"},
    "reference": TIMED, "model": TIMED, "ratio": {"prefill": 0.5431, "decode": 1.0},
}  # fmt: skip


def with_everything(report: dict[str, Any]) -> dict[str, Any]:
    found = copy.deepcopy(report)
    found["evaluation"] |= {"tasks": copy.deepcopy(TASKS), "speed": copy.deepcopy(SPEED)}
    return found


def many_blocks(report: dict[str, Any], n: int) -> dict[str, Any]:
    """The same with `n` blocks, long names, and more layers than a table shows."""
    found = copy.deepcopy(report)
    rows = [
        {"block": i, "relative_error": 0.01 * (i + 1), "cosine": 0.99, "local_relative_error": 0.001 * (1 + i * 7 % n),
         "local_cosine": 0.999} for i in range(n)
    ]  # fmt: skip
    worst = sorted(range(n), key=lambda i: -rows[i]["local_relative_error"])
    found["evaluation"]["hidden_states"] |= {"blocks": rows, "worst": worst}
    layers = [layer for layer in found["layers"] if layer["block"] == 0]
    found["layers"] = [
        {**layer, "block": i, "name": layer["name"].replace(".0.", f".{i}.") + "_of_an_unusually_long_name" * 4}
        for i in range(n)
        for layer in layers
    ]
    return found


def unknown_to_us(report: dict[str, Any]) -> dict[str, Any]:
    """Names that would be markup; figures that are missing."""
    found = copy.deepcopy(report)
    found["layers"][0]["name"] = "<script>alert(1)</script>&amp;"
    found["warnings"] = ['<img src="http://example.org/x.png">']
    found["base"]["title"] = "<b>bold</b>"
    for layer in found["layers"]:
        layer["figures"] = {}
    found["evaluation"]["hidden_states"] = not_comparable("they are <different>")
    return found


def rewritten(report: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """Blocks were left out first, in two looks."""
    rounds = [
        {"loss": 2.25, "scores": [87640.5, 2.75, 3.0, None]},
        {"loss": 2.75, "scores": [9.5, None, 3.125, None]},
    ]
    figures = {"blocks": [1, 2], "order": [1, 2], "score": "perplexity", "selection": "iterative", "rounds": rounds}
    steps = [
        {"step": 0, "method": "drop_blocks", "note": "leaves out blocks 1, 2 of 0 to 3", "figures": figures},
        {"step": 1, "method": "rotate", "note": "<turned>", "figures": {"seconds": 3}},
    ]
    return {**copy.deepcopy(report), "rewrites": steps, **changed}


VARIANTS = {
    "run": lambda report: report,
    "rewritten": rewritten,
    "rewritten and nothing else": lambda report: rewritten(
        report, layers=[], bytes_before=0, bytes_after=0, bits_per_weight=0.0
    ),
    "everything": with_everything,
    "80 blocks": lambda report: many_blocks(report, 80),
    "strange": unknown_to_us,
    "unmeasured": lambda report: {**report, "evaluation": {}},
    "evaluation": lambda report: {
        **{key: report[key] for key in ("schema", "created", "versions", "machine", "size")},
        "kind": "evaluation", **report["evaluation"], "tasks": TASKS,
    },
    "tasks of one model": lambda report: {
        **{key: report[key] for key in ("schema", "created", "versions", "machine")}, "kind": "evaluation",
        "model": {"path": "a/model"}, "size": {**report["size"], "reference": None}, "tasks": {"model": TASKS["model"]},
    },
}  # fmt: skip
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@every_variant
def test_it_is_well_formed_and_loads_nothing(variant: str, report: dict[str, Any]) -> None:
    made = page(VARIANTS[variant](report))
    reader = read(made)
    for tag, attributes in reader.attributes:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "audio", "video", "image"), tag
        for name, value in attributes.items():
            assert name not in ("src", "srcset", "action", "background", "data"), (tag, name)
            assert not name.startswith("on")
            if name in ("href", "xlink:href"):
                assert str(value).startswith("#")
    code = "".join(re.findall(r"<(?:style|script)[^>]*>(.*?)</(?:style|script)>", made, re.DOTALL))
    assert "@import" not in code
    assert "fetch(" not in code
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", made))
    assert "http" not in re.sub(r"&lt;.*?&gt;", "", made)
    assert sum(tag == "script" for tag, _ in reader.attributes) == 1
    identifiers = [a["id"] for _, a in reader.attributes if a.get("id")]
    assert len(identifiers) == len(set(identifiers))  # of clipping paths: those of one plot are not another's


@every_variant
def test_every_figure_is_that_of_the_json(variant: str, report: dict[str, Any]) -> None:
    content = json.loads(json.dumps(VARIANTS[variant](report)))
    figures = read(page(content)).figures
    assert len(figures) > {"run": 150, "80 blocks": 1000}.get(variant, 10)
    for pointer, per, text in figures:
        value = resolve(content, pointer)
        if per is not None:
            value /= resolve(content, per)
        if " min" in text or text.endswith(" h"):
            assert text == human_time(value)
            continue
        shown, half = figure_of(text)
        assert math.isclose(shown, value, abs_tol=half, rel_tol=1e-9), (pointer, per, text, value)


def test_the_headline_figures_come_first(report: dict[str, Any]) -> None:
    figures = [pointer for pointer, _, _ in read(page(with_everything(report))).figures]
    first = figures[: figures.index("/evaluation/hidden_states/blocks/0/block")]
    for pointer in (
        "/size/model/bytes_tensors", "/bits_per_weight", "/evaluation/model/perplexity", "/evaluation/reference/perplexity",
        "/evaluation/fidelity/kl_mean", "/evaluation/fidelity/kl_p99", "/evaluation/fidelity/top1_agreement",
        "/evaluation/speed/model/decode/tokens_per_second", "/evaluation/speed/reference/decode/tokens_per_second",
    ):  # fmt: skip
        assert pointer in first


def test_the_sections_are_those_that_there_are_figures_for(report: dict[str, Any]) -> None:
    def headings(found: dict[str, Any]) -> list[str]:
        return re.findall(r"<h2>(.*?)</h2>", page(found))

    how = ["Recipe", "How to load it", "What it cost", "Versions"]
    assert headings(report) == ["Which block hurts most", "Bytes", "Layers", *how]
    assert headings(with_everything(report)) == [
        "Which block hurts most",
        "Benchmarks",
        "Speed",
        "Bytes",
        "Layers",
        *how,
    ]
    assert headings(VARIANTS["unmeasured"](report)) == ["Bytes", "Layers", *how]
    assert headings(VARIANTS["tasks of one model"](report)) == ["Benchmarks", "Bytes", "Layers", "Versions"]
    assert headings(unknown_to_us(report))[0] == "Blocks"


def test_what_rewrote_the_model_comes_first_with_a_bar_for_each_score(report: dict[str, Any]) -> None:
    made = page(rewritten(report))
    assert re.findall(r"<h2>(.*?)</h2>", made)[0] == "Rewritten first"
    words = " ".join(read(made).words)
    assert (
        "drop_blocks, then rotate, then" in words
        and "leaves out blocks 1, 2 of 0 to 3" in words
        and "<turned>" in words
    )
    (wide, _) = re.findall(r'<svg[^>]*aria-label="loss of the calibration rows[^>]*>.*?</svg>', made, re.DOTALL)
    colours = re.findall(r'<path d="M[^"]*z\s*"[^>]*clip-path[^>]*style="fill: var\(--(after|strong)\)', wide)
    assert sorted(colours) == ["after", "strong", "strong"]


def test_recipe_loading_and_warnings_are_there(report: dict[str, Any]) -> None:
    words = " ".join(read(page(report)).words)
    for piece in ("group_size: 32", "symmetric: false", "CompressedTensorsConfig(dequantize=True)", "compress.load("):
        assert piece in words
    assert report["warnings"]
    for warning in report["warnings"]:
        assert warning in words


def test_plots_are_drawn_from_the_figures(report: dict[str, Any]) -> None:
    """Bars are as many and as long as the errors of blocks; the longest belongs to the worst."""
    rows, worst = (report["evaluation"]["hidden_states"][key] for key in ("blocks", "worst"))
    made = page(report)
    wide = re.search(r'<svg[^>]*aria-label="Relative error of hidden states[^>]*>.*?</svg>', made, re.DOTALL)
    assert wide is not None
    bars = re.findall(r'<path d="M ([\d.]+) ([\d.]+)\s+L ([\d.]+) [\d.]+\s+L [\d.]+ ([\d.]+)[^"]*"[^>]*clip-path[^>]*'
                      r'style="fill: var\(--(after|strong)\)', wide[0])  # fmt: skip
    heights = {}
    for left, bottom, _, top, colour in bars:
        heights[float(left)] = (float(bottom) - float(top), colour)
    drawn = [heights[left] for left in sorted(heights)]
    assert len(drawn) == len(rows)
    tallest = max(height for height, _ in drawn)
    most = rows[worst[0]]["local_relative_error"]
    for (height, colour), row in zip(drawn, rows, strict=True):
        assert height / tallest == pytest.approx(row["local_relative_error"] / most, rel=1e-3)
        assert (colour == "strong") == (row["block"] == worst[0])


@every_variant
def test_reports_keep_to_the_schema(variant: str, report: dict[str, Any]) -> None:
    jsonschema.validate(json.loads(json.dumps(VARIANTS[variant](report))), json_schema())


def test_an_evaluation_keeps_to_the_schema_alone_and_beside_another(text: Path, tmp_path: Path) -> None:
    folder = save_tiny("gpt2", tmp_path / "model")
    settings = Evaluation(data=(str(text),), length=32, max_tokens=96)
    for reference in (None, folder):
        found = json.loads(json.dumps(evaluate(folder, reference=reference, settings=settings)))
        jsonschema.validate(found, json_schema())
        read(page(found))


def test_a_key_that_nobody_described_is_found(report: dict[str, Any]) -> None:
    for changed in ({**report, "more": 1}, {**report, "schema": 1}, {**report, "size": {**report["size"], "x": 0}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(json.loads(json.dumps(changed)), json_schema())


def test_a_report_of_another_version_is_refused(report: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="version 1, this compress-llm writes version 2"):
        write_page({**report, "schema": 1}, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
