from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from compress import methods
from compress.errors import RecipeError
from compress.methods.base import MethodConfig, SiteMethod
from compress.methods.rewrite import ModelMethod
from compress.methods.tuning import TuningMethod


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_is_where_the_table_says(name):
    method = methods.find(name)
    assert issubclass(method, (SiteMethod, ModelMethod, TuningMethod))
    assert method.name == name
    assert method.summary
    assert issubclass(method.Config, MethodConfig)
    for field in method.Config.model_fields.values():
        assert field.description


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(RecipeError, match=r"^method 'gtpq' does not exist; did you mean 'gptq'\?$"):
        methods.find("gtpq")
    with pytest.raises(RecipeError, match=r"known: .*gptq, .*laser, .*rtn"):
        methods.find("zzzzzz")


def test_listing_names_imports_nothing_heavy():
    code = (
        "import sys; from compress import methods; methods.names(); "
        "heavy = {'torch', 'transformers', 'pydantic'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def outside(monkeypatch, value: str) -> None:
    point = EntryPoint("theirs", value, methods.ENTRY_POINTS)
    monkeypatch.setattr(methods, "entry_points", lambda group: [point])


def test_an_outside_package_adds_a_method(monkeypatch):
    outside(monkeypatch, "compress.methods.rtn:RTN")
    assert "theirs" in methods.names()
    assert methods.find("theirs").name == "rtn"


@pytest.mark.parametrize(
    "value", ["no_such_package.method:Method", "compress.methods.rtn:NoSuch", "compress.errors:RecipeError"]
)
def test_a_broken_outside_method_is_named(monkeypatch, value):
    outside(monkeypatch, value)
    with pytest.raises(RecipeError, match="'theirs' of"):
        methods.find("theirs")
