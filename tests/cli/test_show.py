"""Sizes, times, tables."""

from __future__ import annotations

import io
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.cli.layers import alike
from compress.cli.options import UNITS, parse_size
from compress.cli.show import human_bytes, human_time, once_each, print_json, show, table
from compress.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 * 2**30), ("512MB", 512 * 10**6), ("1.5G", 1.5 * 2**30), ("1000", 1000), (" 2 kib ", 2048), ("7B", 7)],
)
def test_sizes_are_read(text, size):
    assert parse_size(text, "--activation-memory") == size


@pytest.mark.parametrize("text", ["", "GiB", "8GiBs", "-1GB", "8 8", "1e9x", "eight"])
def test_what_is_no_size_is_refused_by_the_options_name(text):
    with pytest.raises(RecipeError, match="--activation-memory"):
        parse_size(text, "--activation-memory")


@given(st.integers(0, 10**15))
def test_shown_sizes_read_back_to_three_digits(size):
    shown = human_bytes(size)
    assert math.isclose(parse_size(shown, "x"), size, rel_tol=0.01)
    assert shown.split()[1].lower() in {*UNITS, "b"}


@given(st.floats(0, 10**7))
def test_times_are_short_and_never_sixty_seconds(seconds):
    shown = human_time(seconds)
    assert len(shown) <= 12
    assert ":60" not in shown


def test_names_with_brackets_are_no_markup_and_nothing_is_cut():
    stream = io.StringIO()
    name = "model.layers.[0-5]." + "x" * 100
    show(table(("layers", ">n"), [(name, 6), ("[red]", 1)]), stream=stream)
    assert name in stream.getvalue()
    assert "[red]" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()
    assert all(line == line.rstrip() for line in stream.getvalue().splitlines())


def test_json_has_no_nan(capsys):
    print_json({"a": [math.inf, 1.0], "b": {"c": math.nan}})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"a": [None, 1.0], "b": {"c": None}}


def test_messages_come_once_and_not_by_the_thousand():
    assert once_each(["a", "b", "a"]) == ["a", "b"]
    many = once_each(str(i) for i in range(1000))
    assert len(many) == 10
    assert "991 more" in many[-1]


@given(st.dictionaries(st.sampled_from([f"m.{i}.{n}" for i in range(6) for n in "qkv"]), st.sampled_from("ab")))
def test_alike_layers_are_counted_once_each(kinds):
    rows = alike(kinds)
    assert sum(count for _, _, count in rows) == len(kinds)
    assert sum(count for _, kind, count in rows if kind == "a") == list(kinds.values()).count("a")
    assert [(name, kind, 1) for name, kind in kinds.items()] == alike(kinds, one_each=True)
