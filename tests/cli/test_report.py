"""The report through the command line: page and JSON of a run, of an evaluation, made anew, and measured again."""

from __future__ import annotations

import json
import subprocess
import sys

import jsonschema
import pytest

from compress.report.schema import json_schema
from tests.report.test_page import figure_of, read, resolve
from tests.runs import fingerprints

PAGE, REPORT = "compress_report.html", "compress_report.json"


def check(page_file, report):
    """The page says what the report says."""
    figures = read(page_file.read_text()).figures
    assert len(figures) > 50
    for pointer, per, text in figures:
        value = resolve(report, pointer) / (resolve(report, per) if per else 1)
        shown, half = figure_of(text)
        assert shown == pytest.approx(value, abs=half, rel=1e-9)


def test_a_run_leaves_a_page_and_names_the_worst_block(recipe, tmp_path, compress):
    answer = compress("run", "--recipe", recipe, "--out", tmp_path / "out", "--quiet")
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    jsonschema.validate(report, json_schema())
    check(tmp_path / "out" / PAGE, report)
    worst = report["evaluation"]["hidden_states"]["worst"][0]
    line = next(line for line in answer.out.splitlines() if line.startswith("error by block"))
    assert f"by block {worst}," in line.partition(";")[0]
    assert line.endswith("added up behind the last of 3")
    assert f"as a page: {PAGE}" in answer.out
    assert "in memory" in answer.out


def test_the_page_is_made_anew_from_the_json(finished, tmp_path, compress):
    before = (finished / PAGE).read_text()
    (finished / PAGE).unlink()
    answer = compress("report", finished)
    assert answer.code == 0
    assert (finished / PAGE).read_text() == before
    assert "perplexity per token" in answer.out
    assert compress("report", finished, "--html", tmp_path / "other.html", "--quiet").out == ""
    assert (tmp_path / "other.html").read_text() == before


def test_an_evaluation_as_table_json_and_page(model, finished, tmp_path, compress):
    line = ["eval", finished, "--reference", model, "--length", 32, "--max-tokens", 160]
    answer = compress(*line, "--html", tmp_path / "page.html", "--json", "--quiet")
    found = json.loads(answer.out)
    jsonschema.validate(found, json_schema())
    check(tmp_path / "page.html", found)
    table = compress(*line, "--quiet").out
    for words in ("error by block", "error alone", "error added up", "in memory"):
        assert words in table
    rows = [words for text in table.splitlines() if len(words := text.split()) == 7 and words[0].isdigit()]
    assert [int(words[0]) for words in rows] == [0, 1, 2]
    for words, block in zip(rows, found["hidden_states"]["blocks"], strict=True):
        assert float(words[1]) == pytest.approx(100 * block["local_relative_error"], rel=0.01)
        assert float(words[3]) == pytest.approx(block["local_cosine"], abs=1e-6)
        assert float(words[4]) == pytest.approx(100 * block["relative_error"], rel=0.01)
        assert float(words[6]) == pytest.approx(block["cosine"], abs=1e-6)
    (tmp_path / "found.json").write_text(json.dumps(found))
    again = compress("report", tmp_path / "found.json")
    assert "error alone" in again.out
    check(tmp_path / "found.html", found)


def test_of_many_blocks_the_table_shows_the_worst():
    from compress.cli.blocks import block_rows, block_table

    rows = [
        {
            "block": i,
            "relative_error": 0.1,
            "cosine": 0.9,
            "local_relative_error": 0.01 + (i == 40) / 10,
            "local_cosine": 1.0,
        }
        for i in range(80)
    ]
    found = {"reason": None, "blocks": rows, "worst": [40, *range(40), *range(41, 80)]}
    table = block_table(found)
    assert table is not None
    assert table.row_count == 10
    assert "of 80 blocks" in str(table.title)
    assert block_rows(found)[0][1].startswith("most alone: 11.0 % by block 40")


def test_another_evaluation_of_a_finished_run_is_measured_and_nothing_else(recipe, tmp_path, compress):
    out = tmp_path / "out"
    line = ["run", "--recipe", recipe, "--out", out, "--quiet"]
    assert compress(*line, "--set", "evaluation=false").code == 0
    weights = {name: digest for name, digest in fingerprints(out).items() if name != "recipe.yaml"}
    unmeasured = json.loads((out / REPORT).read_text())
    assert unmeasured["evaluation"] == {}

    answer = compress(*line)
    assert "only measured again" in answer.out
    measured = json.loads((out / REPORT).read_text())
    jsonschema.validate(measured, json_schema())
    check(out / PAGE, measured)
    assert measured["evaluation"]["text"]["length"] == 64
    assert measured["layers"] == unmeasured["layers"]
    assert measured["seconds"]["compress"] == unmeasured["seconds"]["compress"]
    assert {name: digest for name, digest in fingerprints(out).items() if name != "recipe.yaml"} == weights
    assert "max_tokens: 256" in (out / "recipe.yaml").read_text()
    assert measured["files"]["recipe.yaml"] == (out / "recipe.yaml").stat().st_size

    assert "nothing was done" in compress(*line).out
    assert (
        "nothing was done" in compress(*line, "--set", "evaluation=false").out
    )  # asks for nothing: what is there stays
    other = json.loads(compress(*line, "--set", "evaluation.length=32", "--json").out)
    assert other["already_finished"]
    assert other["evaluated_again"]
    assert other["evaluation"]["text"]["length"] == 32
    assert other["evaluation"]["model"]["perplexity"] != measured["evaluation"]["model"]["perplexity"]


def test_an_interrupted_second_evaluation_leaves_the_old_report(recipe, tmp_path, compress, monkeypatch):
    out = tmp_path / "out"
    line = ["run", "--recipe", recipe, "--out", out, "--quiet"]
    assert compress(*line).code == 0
    before = (out / REPORT).read_text()

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("compress.evaluation.evaluate.evaluate_run", interrupted)
        assert compress(*line, "--set", "evaluation.length=32").code == 130
    assert (out / REPORT).read_text() == before
    assert "only measured again" in compress(*line, "--set", "evaluation.length=32").out


def test_speed_is_measured_where_a_recipe_asks(recipe, tmp_path, compress):
    options = ["--set", "evaluation.speed=true", "--quiet", "--json"]
    answer = compress("run", "--recipe", recipe, "--out", tmp_path / "out", *options)
    assert answer.code == 0, answer.err
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    jsonschema.validate(report, json_schema())
    speed = report["evaluation"]["speed"]
    assert speed["model"]["decode"]["tokens_per_second"] > 0
    assert speed["reference"]["prefill"]["tokens_per_second"] > 0
    assert "decode, tokens/s" in compress("report", tmp_path / "out").out
    check(tmp_path / "out" / PAGE, report)


def test_without_matplotlib_a_run_ends_well_and_says_how_to_get_the_page(recipe, tmp_path, compress, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
        done = compress("run", "--recipe", recipe, "--out", out)
        assert "pip install matplotlib" in compress("report", out).error
        assert "pip install matplotlib" in compress("eval", out, "--html", tmp_path / "page.html").error
    assert done.code == 0
    assert "perplexity per token" in done.out
    assert f"{PAGE} was not made" in done.err
    assert f"compress report {out}" in done.err
    assert not (out / PAGE).exists()
    assert (out / REPORT).exists()
    assert not (out / ".compress").exists()
    assert compress("report", out).code == 0
    assert (out / PAGE).exists()


def test_plots_are_imported_when_one_is_drawn_and_not_before():
    program = "import sys, compress.cli.main, compress.report.write; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "{tmp}/nowhere"], "no such report"),
        (["report", "{tmp}"], "compress_report.json: no such report"),
        (["report", "{tmp}/broken.json"], "broken.json"),
        (["report", "{tmp}/other.json"], "cannot be made from a report of version None"),
        (["report", "{finished}", "--html", "{tmp}/no/such/page.html"], "is no folder; name a file"),
        (["eval", "{finished}", "--html", "{tmp}"], "is a folder; name a file"),
    ],
)
def test_what_is_no_report_is_one_line(arguments, words, finished, tmp_path, compress):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text("{}")
    places = {"tmp": tmp_path, "finished": finished}
    assert words in compress(*(argument.format(**places) for argument in arguments)).error
