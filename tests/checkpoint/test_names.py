import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.checkpoint.names import compact, expand, expressions
from compress.errors import CheckpointError

ROLES = ("gate_proj", "up_proj", "down_proj")
MANY = [f"model.layers.{i}.mlp.experts.{e}.{r}" for i in range(48) for e in range(128) for r in ROLES]
names = st.sets(
    st.lists(st.sampled_from(["a", "b", "0", "1", "2", "10", "01"]), min_size=1, max_size=4).map(".".join), max_size=40
)


@given(names)
def test_expand_inverts_compact(some):
    assert sorted(expand(compact(some))) == sorted(some)


@given(names, names)
def test_expressions_match_these_and_no_others(some, others):
    patterns = expressions(some, some | others)
    for name in some | others:
        assert any(re.match(pattern, name) for pattern in patterns) == (name in some)


def test_a_large_mixture_of_experts_takes_a_few_lines():
    assert compact(MANY) == sorted(f"model.layers.[0-47].mlp.experts.[0-127].{role}" for role in ROLES)
    skipped = [name for name in MANY if ".layers.7." not in name]
    assert len(compact(skipped)) == 3
    assert len("".join(expressions(skipped, MANY))) < 1000


@pytest.mark.parametrize(
    "pattern",
    [
        "a.[0-9999999].b",
        "a.[0-999999].[0-999999]",
        "a.[1-].b",
        "a.[].b",
        "a.[0--1]",
        "[" + "1," * 60_000 + "1]",
        7,
        None,
    ],
)
def test_patterns_of_strangers_are_refused(pattern):
    with pytest.raises(CheckpointError):
        list(expand([pattern]))
