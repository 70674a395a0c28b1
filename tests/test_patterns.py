"""Patterns on the names on disk: what they match, and what is said of those that match nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import RecipeError
from compress.patterns import matches, select

ROLES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
BLOCKS = [f"model.layers.{i}.{role}" for i in range(12) for role in ROLES]
OUTSIDE = ["model.embed_tokens", "lm_head"]
NAMES = [OUTSIDE[0], *BLOCKS, OUTSIDE[1]]


def chosen(layers=None, skip=()):
    return select(NAMES, layers, skip, outside=OUTSIDE)


def test_by_default_every_linear_of_the_blocks_and_nothing_else():
    assert chosen() == BLOCKS


@pytest.mark.parametrize(
    ("pattern", "n"),
    [
        ("*", 48),
        ("*.down_proj", 12),
        ("model.layers.1.*", 4),
        ("model.layers.[0-3].*", 16),
        ("model.layers.?.mlp.up_proj", 10),
        ("model.layers.3.mlp.down_proj", 1),
        (r"re:.*\.(q|o)_proj", 24),
        (r"re:model\.layers\.1\d\..*", 8),
        ("lm_head", 1),
        ("*embed_tokens", 1),
        ("re:lm_head|.*down_proj", 13),
    ],
)
def test_what_a_pattern_matches(pattern, n):
    assert len(chosen([pattern])) == n


def test_patterns_add_up_and_skip_takes_away_in_the_order_of_the_model():
    names = chosen(["lm_head", "*.down_proj", "*.up_proj"], ["model.layers.0.*", "*.1.mlp.up_proj"])
    assert names == [n for n in NAMES if n in names]
    assert names[0] == "model.layers.1.mlp.down_proj"
    assert names[-1] == "lm_head"
    assert len(names) == 22


@pytest.mark.parametrize("pattern", ["down_proj", "re:down_proj", "model.layers", "re:model.layers.0"])
def test_a_part_of_a_name_is_no_match(pattern):
    with pytest.raises(RecipeError, match="matches none of the 50 layers"):
        chosen([pattern])


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("*.donw_proj", "'*.down_proj'"),
        ("down_proj", "'*.down_proj'"),
        ("model.layers.99.mlp.up_proj", "'model.layers.*.mlp.up_proj'"),
        ("model.layer.0.mlp.up_proj", "'model.layers.*.mlp.up_proj'"),
        ("lm_haed", "'lm_head'"),
        ("re:.*donw.*", "model.layers.*.mlp.down_proj"),
    ],
)
def test_a_pattern_that_matches_nothing_is_told_the_nearest(pattern, near):
    with pytest.raises(RecipeError) as error:
        chosen([pattern])
    assert near in str(error.value)
    with pytest.raises(RecipeError, match=r"^steps\.2\.skip: "):
        select(NAMES, None, [pattern], outside=OUTSIDE, where="steps.2")


def test_layers_outside_the_blocks_must_be_named():
    with pytest.raises(RecipeError, match="lm_head only, which must be named"):
        chosen(["lm*"])


@pytest.mark.parametrize("pattern", ["re:(", "re:", "", " ", "re:*x"])
def test_what_is_no_pattern(pattern):
    with pytest.raises(RecipeError, match="pattern"):
        matches(pattern, "x")


@given(st.sampled_from(NAMES))
def test_a_name_is_a_pattern_for_itself_alone(name):
    assert chosen([name]) == [name]


@given(st.lists(st.sampled_from(BLOCKS), unique=True, min_size=1), st.lists(st.sampled_from(BLOCKS), unique=True))
def test_selection_is_set_difference(layers, skip):
    assert set(chosen(layers, skip)) == set(layers) - set(skip)
