"""What a user gets: a wheel with recipes, model and texts inside; pinned versions; recipes and scripts that run."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from compress import shipped

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture(scope="module")
def project(root):
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory):
    """The wheel of this checkout, built without a network."""
    if find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed (extra dev): the wheel is not tested")
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)],
        cwd=root,
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.whl"))


def test_the_wheel_holds_recipes_model_and_texts_and_no_tests(wheel, root):
    names = set(zipfile.ZipFile(wheel).namelist())
    for recipe in (root / "recipes").glob("*.yaml"):
        assert f"compress/recipes/{recipe.name}" in names
    for path in (root / "compress" / "data").rglob("*"):
        if path.is_file():
            assert str(path.relative_to(root)) in names
    assert {name.split("/")[0] for name in names} == {
        "compress",
        next(n for n in names if "dist-info" in n).split("/")[0],
    }
    assert any(name.endswith("LICENSE") for name in names)


def test_an_installed_wheel_finds_its_recipes_model_and_texts(wheel, tmp_path):
    """Installed by pip into a folder of its own; what it depends on comes from this environment."""
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import compress; from compress import shipped; from compress.recipe import Recipe\n"
        "assert compress.__file__.startswith(sys.argv[1]), compress.__file__\n"
        "assert str(shipped.recipes_path()).startswith(sys.argv[1])\n"
        "texts = [shipped.calibration_text_path(), shipped.heldout_text_path()]\n"
        "for path in [shipped.model_path() / 'model.safetensors', *texts]:\n"
        "    assert str(path).startswith(sys.argv[1]) and path.stat().st_size > 100_000, path\n"
        "print(*(Recipe.load(name).steps[0].method for name in sorted(shipped.recipes())))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(site)], cwd=tmp_path, text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.split()) == len(shipped.recipes())
    assert (site / "bin" / "compress").exists()


def test_every_dependency_is_pinned_within_its_range(project, root):
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pins = {}
    for line in (root / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), line
            pins.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    extras = project["project"]["optional-dependencies"]
    for text in [*project["project"]["dependencies"], *extras["export"], *extras["dev"]]:
        wanted = Requirement(text)
        if canonicalize_name(wanted.name) == "compress-llm":
            continue
        for pin in pins[canonicalize_name(wanted.name)]:
            assert str(pin.specifier).removeprefix("==") in wanted.specifier, (text, str(pin))
    for versions in pins.values():  # one pin for each version of Python
        for python in ("3.10", "3.11", "3.12", "3.13"):
            assert sum(p.marker is None or p.marker.evaluate({"python_version": python}) for p in versions) <= 1


def test_what_is_installed_here_is_what_is_pinned(root):
    """A warning in words: the figures in the docs come from the pinned versions."""
    from importlib.metadata import PackageNotFoundError, version

    different = []
    for name in ("torch", "transformers", "safetensors", "numpy"):
        pinned = re.search(rf"^{name}==(\S+)", (root / "constraints.txt").read_text(encoding="utf-8"), re.M)
        try:
            installed = version(name).partition("+")[0]
        except PackageNotFoundError:
            installed = "none"
        if pinned is None or installed != pinned[1]:
            different.append(f"{name} {installed}")
    if different:
        pytest.skip(f"not the pinned versions: {', '.join(different)}; the tests run, figures may differ")


def test_the_texts_that_ship_are_text_and_share_no_paragraph():
    calibration = shipped.calibration_text_path().read_text(encoding="utf-8")
    heldout = shipped.heldout_text_path().read_text(encoding="utf-8")
    assert 400_000 < len(calibration.encode()) < 600_000
    assert 150_000 < len(heldout.encode()) < 200_000
    common = {p for p in calibration.split("\n\n") if len(p) > 80} & set(heldout.split("\n\n"))
    assert not common


def test_the_texts_are_what_the_script_cuts(root, shared, tmp_path):
    for source, target, excerpts, kilobytes in (("train", "calibration", 32, 512), ("valid", "heldout", 24, 180)):
        out = tmp_path / f"{target}.txt"
        subprocess.run(
            [sys.executable, str(root / "scripts" / "cut_demo_text.py"), "--source"]
            + [str(shared / "data" / "novels" / f"{source}.txt"), "--excerpts", str(excerpts)]
            + ["--kilobytes", str(kilobytes), "--out", str(out)],
            check=True,
            capture_output=True,
        )
        assert out.read_bytes() == (root / "compress" / "data" / f"{target}.txt").read_bytes()


TINY = "--vocabulary 512 --hidden 32 --mlp 64 --layers 2 --heads 2 --kv-heads 1 --context 64 --batch 8 --threads 1"


def test_a_model_can_be_trained_from_text(root, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, heldout = tmp_path / "model", tmp_path / "heldout.txt"
    heldout.write_text(shipped.heldout_text_path().read_text(encoding="utf-8")[:10_000], encoding="utf-8")
    command = [sys.executable, str(root / "scripts" / "train_demo_model.py"), "--tokens", "12000", *TINY.split()]
    command += ["--train", str(shipped.heldout_text_path()), "--heldout", str(heldout), "--out", str(out)]
    run = subprocess.run(command, text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    losses = [float(x) for x in re.findall(r"loss (\d+\.\d+)", run.stderr)]
    assert losses[-1] < losses[0]
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("A sea voyage — über").input_ids) == "A sea voyage — über"
    assert len(tokenizer) == 512
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.num_hidden_layers == 2
    assert "erplexity" in (out / "README.md").read_text(encoding="utf-8")


def test_no_path_of_a_machine_and_no_registry_host_in_the_tree(root):
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout: the tree is not searched")
    forbidden = re.compile(r"(?<![\w.])/(?:work|root|home)/\w|pypi\.org|files\.pythonhosted|download\.pytorch")
    for name in filter(None, listed.stdout.split("\0")):
        path = root / name
        if path.suffix in (".safetensors", ".so") or path == Path(__file__) or not path.is_file():
            continue
        found = forbidden.search(path.read_text(encoding="utf-8", errors="ignore"))
        assert found is None, f"{name}: {found and found[0]}"
