"""README.md and docs/ say what is true: their commands and code run, their recipes are recipes, their links lead somewhere.

Every page is gone through from top to bottom in a folder of its own, with the shipped model. How its blocks are taken:

    ```bash      `compress …` is run, and must succeed; `make …` must be a target, scripts must exist; `> FILE` is kept to;
                 `pip install ./DIR` makes a package that the page wrote importable, entry points included
    ```python    is executed; the blocks of a page share their names
    ```yaml      must be a recipe, or a part of one
    ```json, ```toml     must parse
    <!-- file: NAME -->         before a block: it is written to that file as well (and, if Python, not executed)
    <!-- not run: REASON -->    before a block: its command lines are parsed, and its recipes loaded, and that is all

To be quick, recipes are cut down to a few rows and tokens: what is tested is that it works, not the numbers.
"""

from __future__ import annotations

import configparser
import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from compress.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- (file|not run): ([^\n]*?) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
GENERATED = re.compile(r"<!-- generated:.*?<!-- end -->", re.DOTALL)
OTHER_COMMANDS = (
    "accelerate",
    "hf",
    "pip",
    "python",
    "python3",
    "git",
    "cd",
    ".",
    "source",
    "export",
)  # left to the reader
SAMPLES, LENGTH, TOKENS = 8, 64, 512
SHARED_COMMANDS = [
    ["run", "--recipe", "demo", "--out", "out/demo"]
]  # of many pages: the first one runs it, others get its result

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@dataclass(frozen=True)
class Block:
    """A fenced block of a page. `line` is that of its first line of content."""

    language: str
    text: str
    line: int
    file: str | None
    not_run: str | None


def blocks(page: Path) -> list[Block]:
    content = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(content):
        kind, value, language, text = match.groups()
        line = content.count("\n", 0, match.start(4)) + 1
        found.append(
            Block(language, text, line, value if kind == "file" else None, value if kind == "not run" else None)
        )
    return found


def command_lines(text: str) -> list[str]:
    """The commands of a bash block: continued lines joined, comments and empty lines left out."""
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    return [part.strip() for line in lines if line and not line.startswith("#") for part in line.split("&&")]


class Reader:
    """Goes through a page as a reader would who tries everything."""

    def __init__(self, page: Path, monkeypatch: pytest.MonkeyPatch, finished: dict[str, Path]):
        self.page, self.monkeypatch, self.finished = page, monkeypatch, finished
        self.names: dict[str, Any] = {"__name__": "__main__"}

    def block(self, block: Block) -> None:
        where = f"{self.page.relative_to(ROOT)}:{block.line}"
        if block.file is not None:
            file = Path(block.file)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, encoding="utf-8")
        if block.language == "bash":
            for line in command_lines(block.text):
                self.command(line, where, run=block.not_run is None)
        elif block.language == "yaml" and block.text.startswith("task:"):
            yaml.safe_load(block.text)  # a task of lm-eval, which the commands after it run
        elif block.language == "yaml":
            self.recipe(yaml.safe_load(block.text), where)
        elif block.language == "python":
            code = compile("\n" * (block.line - 1) + block.text, str(self.page), "exec")
            if block.file is None and block.not_run is None:
                with redirect_stdout(io.StringIO()):
                    exec(code, self.names)
        elif block.language == "json":
            json.loads(block.text)
        elif block.language == "toml":
            _sections(block.text)

    def command(self, line: str, where: str, run: bool) -> None:
        words = shlex.split(line, comments=True)
        while re.match(r"\w+=", words[0]):  # OMP_NUM_THREADS=2 compress …
            del words[0]
        words[0] = words[0].removeprefix(".venv/bin/")
        if words[0] == "make":
            targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert words[1] in targets, f"{where}: no target {words[1]} in the Makefile"
        elif words[:2] == ["pip", "install"] and words[2].startswith("./"):
            self.install(Path(words[2]))
        elif words[0] != "compress":
            assert words[0] in OTHER_COMMANDS, f"{where}: {line}: a command that nobody knows here"
            for word in words[1:]:
                assert not word.startswith("scripts/") or (ROOT / word).exists(), f"{where}: {line}"
        elif run:
            self.run(words[1:], f"{where}: {line}")
        else:
            self.parse(words[1:], f"{where}: {line}")

    def run(self, words: list[str], where: str) -> None:
        from compress.cli.main import main

        target = None
        if ">" in words:
            target = words[words.index(">") + 1]
            words = words[: words.index(">")]
        if words[0] == "eval" and not {"--max-tokens", "--tasks"} & set(words):
            words = [*words, "--max-tokens", str(TOKENS)]
        known = " ".join(words) if words in SHARED_COMMANDS else None
        if known in self.finished and not Path(words[-1]).exists():
            shutil.copytree(self.finished[known], words[-1])
            return
        output, errors = io.StringIO(), io.StringIO()
        with redirect_stdout(output), redirect_stderr(errors):
            code = main(words)
        assert code == 0, f"{where}\n{errors.getvalue()}"
        if known is not None:
            self.finished[known] = Path(
                shutil.copytree(words[-1], self.finished["folder"] / words[-1], dirs_exist_ok=True)
            )
        if "--json" in words:
            json.loads(output.getvalue())
        if target is not None:
            Path(target).write_text(output.getvalue(), encoding="utf-8")

    def parse(self, words: list[str], where: str) -> None:
        import typer

        from compress.cli.main import app
        from compress.cli.options import recipe_overrides

        verbs: Any = typer.main.get_command(app)
        given = verbs.commands[words[0]].make_context(words[0], words[1:]).params
        if "recipe" in given:
            assert Recipe.load(given["recipe"], recipe_overrides(given["model"], given["overrides"])), where

    def recipe(self, written: Any, where: str) -> None:
        assert isinstance(written, dict), f"{where}: no recipe"
        Recipe.from_dict({"model": "shipped", "steps": [{"rtn": {}}], **written}, source=where)

    def install(self, folder: Path) -> None:
        """As pip would: the package of `folder` can be imported and its entry points are found."""
        project = _sections((folder / "pyproject.toml").read_text())
        name = project["project"]["name"].strip('"')
        info = folder / f"{name.replace('-', '_')}-0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
        lines = []
        for section in project.sections():
            if section.startswith("project.entry-points."):
                lines.append(f"[{section.split('.', 2)[2].strip(chr(34))}]")
                lines += [f"{key} = {value.strip(chr(34))}" for key, value in project[section].items()]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        self.monkeypatch.syspath_prepend(str(folder.resolve()))
        importlib.invalidate_caches()


def _sections(text: str) -> configparser.ConfigParser:
    """As much of TOML as a pyproject.toml on these pages uses (Python 3.10 has no parser of it)."""
    parsed = configparser.ConfigParser(interpolation=None)
    parsed.read_string(text)
    return parsed


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Results of commands that several pages have; "folder": where they are kept."""
    return {"folder": tmp_path_factory.mktemp("finished")}


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: dict[str, Path]) -> Any:
    """Makes readers, in an empty folder, with recipes cut down; what the command line sets up is taken back."""
    monkeypatch.chdir(tmp_path)
    for name in ("TRANSFORMERS_VERBOSITY", "TRANSFORMERS_NO_ADVISORY_WARNINGS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    before = set(sys.modules)
    from_dict = Recipe.from_dict.__func__  # type: ignore[attr-defined]

    def cut_down(cls: type[Recipe], written: Any, **options: Any) -> Recipe:
        recipe = from_dict(cls, written, **options)
        calibration = recipe.calibration.model_copy(
            update={
                "samples": min(recipe.calibration.samples, SAMPLES),
                "length": min(recipe.calibration.length, LENGTH),
            }
        )
        evaluation = recipe.evaluation and recipe.evaluation.model_copy(update={"max_tokens": TOKENS, "length": LENGTH})
        return recipe.model_copy(update={"calibration": calibration, "evaluation": evaluation})

    monkeypatch.setattr(Recipe, "from_dict", classmethod(cut_down))
    yield lambda page: Reader(page, monkeypatch, finished)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for name in set(sys.modules) - before:
        if name.startswith("compress_"):
            del sys.modules[name]


@every_page
def test_commands_code_and_recipes_of_a_page_work(page: Path, reader: Any) -> None:
    trying = reader(page)
    for block in blocks(page):
        trying.block(block)


@every_page
def test_what_is_not_run_says_why(page: Path) -> None:
    content = page.read_text(encoding="utf-8")
    assert content.count("<!-- not run:") == sum(block.not_run is not None for block in blocks(page))
    assert content.count("<!-- file:") == sum(block.file is not None for block in blocks(page))
    assert content.count("\n```") == 2 * len(blocks(page))  # every fence was understood
    assert all(block.language for block in blocks(page)), "every block names its language"


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in _anchors(file), f"{page.name}: {target}: headings are {sorted(_anchors(file))}"


def _anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_files_and_names_of_the_code_exist(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    quoted = re.findall(r"`([^`\n]+)`", text)
    for path in quoted:
        if re.fullmatch(r"(compress|tests|scripts|recipes|docs)/[\w./-]*", path):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
    for name in quoted:
        if re.fullmatch(r"compress(\.\w+)+", name) and name not in ("compress.methods", "compress.representations"):
            assert _resolves(name), f"{page.name}: {name}"


def _resolves(name: str) -> bool:
    """Whether `compress.a.b` is a module, or what one holds."""
    module, _, attribute = name.rpartition(".")
    if importlib.util.find_spec(module) is None:
        return False
    return hasattr(importlib.import_module(module), attribute) or importlib.util.find_spec(name) is not None


def test_messages_in_troubleshooting_are_those_of_the_code() -> None:
    source = "".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "compress").rglob("*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # strings that Python joins
    page = ROOT / "docs" / "troubleshooting.md"
    messages = re.findall(r"\*\*`([^`]+)`", page.read_text(encoding="utf-8"))
    assert len(messages) > 15
    for message in messages:
        for fragment in message.split("…"):
            assert fragment.strip() in source, message


def test_generated_parts_are_those_of_the_code() -> None:
    spec = importlib.util.spec_from_file_location("docs_tables", ROOT / "scripts" / "docs_tables.py")
    assert spec and spec.loader
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    stale = [str(f.relative_to(ROOT)) for f, text in tables.current().items() if f.read_text(encoding="utf-8") != text]
    assert not stale, f"{', '.join(stale)}: run python scripts/docs_tables.py"


def test_every_verb_method_and_recipe_has_its_place_in_the_docs() -> None:
    from compress.cli.main import app
    from compress.methods import METHODS

    cli = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for command in app.registered_commands:
        name = command.name or getattr(command.callback, "__name__", "")
        assert f"<!-- generated: verb {name} -->" in cli
    for method in METHODS:
        assert f"<!-- generated: method {method} -->" in (ROOT / "docs" / "methods" / f"{method}.md").read_text()


def test_no_generated_part_is_left_open() -> None:
    for page in PAGES:
        content = page.read_text(encoding="utf-8")
        assert content.count("<!-- generated:") == len(GENERATED.findall(content)) == content.count("<!-- end -->")
