"""Low rank and CUR as a user meets them in the plan: ranks and bytes without weights, and what is refused in one line."""

from __future__ import annotations

import json

import pytest

Q, K, MLP = ("q_proj", "o_proj"), ("k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("method", "ranks", "numbers", "shown"),
    [
        ("svd", (16, 10, 21), 2 * 16 * 128 + 2 * 10 * 96 + 3 * 21 * 192, "low_rank rank=16"),
        ("cur", (14, 9, 19), 2 * (14 * 128 + 14**2) + 2 * (9 * 96 + 9**2) + 3 * (19 * 192 + 19**2), "cur rank=14"),
    ],
)
def test_plan_knows_ranks_bytes_and_format_without_weights(make, compress, method, ranks, numbers, shown):
    recipe = make({method: {"keep_ratio": 0.5}})
    planned = json.loads(compress("plan", "--recipe", recipe, "--json").out)
    assert planned["format"] == "compress"
    found = {layer["name"].rpartition(".")[2]: layer["spec"]["rank"] for layer in planned["layers"]}
    assert found == {name: rank for names, rank in zip((Q, K, MLP), ranks, strict=True) for name in names}
    assert planned["bytes_after"] == 3 * 4 * numbers
    assert shown in compress("plan", "--recipe", recipe).out


@pytest.mark.parametrize(
    ("method", "leaves"), [("svd", ("left", "right")), ("cur", ("rows", "link", "columns"))], ids=["svd", "cur"]
)
def test_ranks_become_multiples_of_the_groups_of_a_later_step(make, compress, method, leaves):
    steps = {method: {"keep_ratio": 0.9}, "skip": ["*.k_proj", "*.v_proj"]}, {"gptq": {"bits": 4, "group_size": 16}}
    planned = json.loads(compress("plan", "--recipe", make(*steps), "--json").out)
    factored = [layer for layer in planned["layers"] if layer["method"] == f"{method}+gptq"]
    assert len(factored) == 15 and {layer["spec"]["rank"] for layer in factored} == {16, 32}
    for layer in factored:
        assert all((layer["spec"][leaf]["bits"], layer["spec"][leaf]["group_size"]) == (4, 16) for leaf in leaves)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"svd": {"rank": 0}}, "steps.0.svd.rank: "),
        ({"svd": {"rank": 4096}}, "no layer would change; model.layers.0.self_attn.q_proj: factors of rank 4096 would hold"),
        ({"svd": {"keep_ratio": 1.5}}, "steps.0.svd.keep_ratio: "),
        ({"svd": {"keep_rate": 0.5}}, "keep_ratio"),
        ({"svd": {"refit": 0.5, "objective": "plain"}}, "refit=0.5 needs objective=whitened, not plain"),
        ({"svd": {}, "layers": "*embed_tokens"}, "embed_tokens: svd is for linears, not for tables; leave it out of layers"),
        ({"cur": {"rank": 0}}, "greater than or equal to 1"),
        ({"cur": {"rank": 33}}, "would hold 1.30 times the numbers of the 64 x 64 weight; use rank=26 or less"),
        ({"cur": {"rank": 65}}, "use rank=26 or less"),
        ({"cur": {"rank": 8, "energy": 0.9}}, "two ways to set a rank"),
        ({"cur": {"matrix": "wandaa"}}, "matrix"),
        ({"cur": {"matrix": "wanda"}}, "looks at the outputs, not at |W|; use selection=deim for matrix=wanda"),
        ({"cur": {}, "layers": ["lm_head", "model.embed_tokens"]}, "cur is for linears, not for tables"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(make, compress, step, said):
    assert said in compress("plan", "--recipe", make(step)).error
