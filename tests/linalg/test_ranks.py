import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import RecipeError
from compress.linalg.ranks import (
    break_even_rank,
    candidate,
    choose,
    effective_rank,
    energy_rank,
    heavy_tail,
    heavy_tail_rank,
    heavy_tail_threshold,
    lorap_ranks,
    rank_choices,
    rounded_rank,
    spend,
    uniform_rank,
)

RULES = ["loss", "heavy_tail", "energy", "effective_rank", "uniform"]
every_rule = pytest.mark.parametrize("rule", RULES)
features = st.integers(1, 5000)


def spectra(*decays, n=24):
    return [np.exp(-decay * np.arange(n)) * (1 + 10 * i) for i, decay in enumerate(decays)]


def size(ranks, shapes):
    return sum(2 * (m * n if k is None else k * (m + n)) for k, (m, n) in zip(ranks, shapes, strict=True))


# ---- one layer


@given(m=features, n=features)
def test_break_even_is_the_last_rank_that_gains(m, n):
    k = break_even_rank(m, n)
    assert k * (m + n) < m * n <= (k + 1) * (m + n)


@given(m=features, n=features, hundredths=st.integers(1, 99), multiple=st.integers(1, 130))
def test_uniform_rank_is_the_largest_within_the_ratio(m, n, hundredths, multiple):
    k = uniform_rank(m, n, hundredths / 100, multiple)
    assert k % multiple == 0 and k >= multiple
    assert 100 * (k + multiple) * (m + n) > hundredths * m * n  # the next one is too much, in whole numbers
    assert k == multiple or 100 * k * (m + n) <= hundredths * m * n


@pytest.mark.parametrize(("rank", "multiple", "expected"), [(1, 1, 1), (100, 32, 96), (31, 32, 32), (64, 32, 64)])
def test_rounding(rank, multiple, expected):
    assert rounded_rank(rank, multiple) == expected


@given(st.lists(st.floats(0, 100), min_size=1, max_size=20), st.floats(0.01, 1))
def test_energy_rank_is_the_least_that_keeps_the_share(values, share):
    energies = sorted(values, reverse=True)
    k = energy_rank(energies, share)
    slack = 1e-9 * sum(energies)
    assert sum(energies[:k]) >= share * sum(energies) - slack
    assert k == 1 or sum(energies[: k - 1]) < share * sum(energies) + slack


def test_effective_rank_counts_directions():
    assert effective_rank([3.0] * 7) == pytest.approx(7)
    assert effective_rank([5.0, 0, 0]) == pytest.approx(1)
    assert effective_rank([0.0, 0]) == 0
    falling = np.exp(-0.3 * np.arange(20))
    assert 1 < effective_rank(falling) < 20
    assert effective_rank(falling * 1e6) == pytest.approx(effective_rank(falling))
    assert effective_rank(falling**2) < effective_rank(falling)


# ---- LoRAP


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.6, 0.66])
def test_lorap_on_square_matrices_is_the_papers(keep):
    ranks = lorap_ranks(dict.fromkeys("qkvo", (4096, 4096)), keep)
    k0 = keep * 4096 / 2
    assert ranks == {"q": int(0.5 * k0), "k": int(0.5 * k0), "v": int(1.5 * k0), "o": int(1.5 * k0)}


@pytest.mark.parametrize("keep", [0.7, 0.8, 0.9])
def test_lorap_keeps_v_and_o_dense_where_they_reach_half(keep):
    ranks = lorap_ranks(dict.fromkeys("qkvo", (4096, 4096)), keep)
    k = int(keep * 4096 - 2048)
    assert ranks == {"q": k, "k": k, "v": None, "o": None}


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.6, 0.75, 0.9])
def test_lorap_spends_its_ratio_with_grouped_heads_too(keep):
    shapes = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)}
    ranks = lorap_ranks(shapes, keep)
    total = sum(m * n for m, n in shapes.values())
    held = sum(m * n if ranks[name] is None else ranks[name] * (m + n) for name, (m, n) in shapes.items())
    assert held <= keep * total
    assert held > keep * total - sum(m + n for m, n in shapes.values())


def test_lorap_that_leaves_nothing_is_refused():
    with pytest.raises(RecipeError, match=r"keep_ratio=0\.51: dense v and o leave nothing for q and k"):
        lorap_ranks(dict.fromkeys("qkvo", (64, 64)), 0.51, bias=1000)


# ---- WeLore


def test_heavy_tail_scales_to_one():
    scaled = heavy_tail([25.0, 9, 4, 1])
    np.testing.assert_allclose(scaled, [1, 0.5, 0.25, 0])
    np.testing.assert_array_equal(heavy_tail([4.0, 4, 4]), 1)
    assert heavy_tail_rank([25.0, 9, 4, 1], 0.25) == 3
    assert heavy_tail_rank([25.0, 9, 4, 1], 1.0) == 1


@pytest.mark.parametrize("reduction", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9])
def test_threshold_is_the_one_that_bisection_finds(reduction):
    layers = spectra(0.1, 0.4, 1.0) + [np.linspace(9, 1, 48)]

    def reached(threshold):
        return np.mean([1 - (heavy_tail(own) >= threshold).mean() for own in layers])

    threshold = heavy_tail_threshold(layers, reduction)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if reached(middle) < reduction else (low, middle)
    assert threshold == pytest.approx(high, abs=1e-9)
    assert reached(threshold) >= reduction - 1e-12
    assert reached(threshold) - reduction <= 1 / 24 + 1e-12  # one value of one layer at most, ties aside


def test_a_layer_with_a_longer_tail_loses_more():
    flat, heavy = np.linspace(2, 1, 24) ** 2, np.exp(-0.8 * np.arange(24))
    threshold = heavy_tail_threshold([flat, heavy], 0.5)
    assert heavy_tail_rank(heavy, threshold) < heavy_tail_rank(flat, threshold)


# ---- spending a budget


def layers_of(rule, decays=(0.05, 0.2, 0.5, 1.0), shapes=None, **kwargs):
    shapes = shapes or [(24, 40), (64, 24), (24, 24), (24, 128)]
    found = [
        candidate(energies, m, n, rule, **kwargs)
        for energies, (m, n) in zip(spectra(*decays), shapes, strict=True)
    ]  # fmt: skip
    return found, shapes


@every_rule
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("multiple", [1, 4])
def test_budget_is_met_and_nothing_that_fits_is_left(rule, keep, multiple):
    layers, shapes = layers_of(rule, multiple=multiple)
    budget = int(keep * sum(2 * m * n for m, n in shapes))
    ranks = spend(layers, budget)
    assert size(ranks, shapes) <= budget
    assert all(k is None or k % multiple == 0 for k in ranks)
    assert all(k is None or k <= break_even_rank(m, n) for k, (m, n) in zip(ranks, shapes, strict=True))
    left = budget - size(ranks, shapes)
    for k, (m, n) in zip(ranks, shapes, strict=True):
        if k is not None:  # one step more of this layer does not fit
            assert min(k + multiple, m * n / (m + n)) * 2 * (m + n) > left + 2 * k * (m + n)


@every_rule
def test_equal_layers_get_equal_ranks(rule):
    energies = np.exp(-0.1 * np.arange(24))
    layers = [candidate(energies, 24, 24, rule) for _ in range(5)]
    for budget in range(5 * 96, 5 * 2 * 24 * 24, 91):
        ranks = spend(layers, budget)
        if None not in ranks:
            assert max(ranks) - min(ranks) <= 1
            assert sum(ranks) == budget // 96


@every_rule
def test_enough_for_everything_keeps_everything(rule):
    layers, shapes = layers_of(rule)
    assert spend(layers, sum(2 * m * n for m, n in shapes)) == [None] * len(shapes)


@every_rule
def test_a_budget_that_nothing_meets_is_refused(rule):
    layers, shapes = layers_of(rule, multiple=4)
    least = sum(2 * 4 * (m + n) for m, n in shapes)
    assert spend(layers, least) == [4, 4, 4, 4]
    with pytest.raises(RecipeError, match=rf"a budget of {least - 1:,} bytes cannot be met: .* take {least:,}"):
        spend(layers, least - 1)


def test_loss_is_spent_where_it_is():
    layers, shapes = layers_of("loss", shapes=[(24, 24)] * 4)
    ranks = spend(layers, sum(2 * m * n for m, n in shapes) * 6 // 10)
    full = [24 if k is None else k for k in ranks]
    assert full == sorted(full, reverse=True) and full[0] > full[-1]  # the flatter the spectrum, the more it gets


@pytest.mark.parametrize("keep", [0.6, 0.8, 1.1])
def test_loss_rule_is_the_best_there_is_without_dense_layers(keep):
    shapes = [(6, 10), (10, 6), (6, 6)]
    rows = [own[:6] for own in spectra(0.3, 0.9, 0.6)]
    layers = [candidate(own, m, n, "loss", dense_bytes=10**9) for own, (m, n) in zip(rows, shapes, strict=True)]
    budget = int(keep * sum(2 * m * n for m, n in shapes))
    mine = spend(layers, budget)
    assert None not in mine

    def loss(ranks):
        return sum(own[k:].sum() / own.sum() for k, own in zip(ranks, rows, strict=True))

    grid = itertools.product(range(1, 7), repeat=3)
    best = min(loss(ranks) for ranks in grid if size(ranks, shapes) <= budget)
    step = max(own[k] / own.sum() for k, own in zip(mine, rows, strict=True) if k < 6)
    assert best <= loss(mine) <= best + step


def test_importance_moves_ranks():
    energies = np.exp(-0.2 * np.arange(24))
    layers = [candidate(energies, 24, 24, "loss", importance=i) for i in (1.0, 2.0)]
    first, second = spend(layers, 2 * 48 * 14)
    assert (first, second) == (5, 9)  # log(2) / 0.2 = 3.5 directions apart


def test_uniform_rule_gives_the_uniform_ratio():
    layers, shapes = layers_of("uniform", shapes=[(24, 40), (64, 24), (24, 24), (24, 128)])
    ranks = spend(layers, int(0.7 * sum(2 * m * n for m, n in shapes)))
    assert all(abs(k - 0.7 * m * n / (m + n)) <= 1 for k, (m, n) in zip(ranks, shapes, strict=True))


def test_effective_rank_rule_is_in_proportion():
    decays = (0.3, 0.5, 1.0)
    layers, _ = layers_of("effective_rank", decays, [(200, 200)] * 3)
    ranks = spend(layers, 2 * 400 * 18)
    effective = [effective_rank(own) for own in spectra(*decays)]
    expected = np.array(effective) * sum(ranks) / sum(effective)
    np.testing.assert_allclose(ranks, expected, atol=1)


def test_energy_rule_keeps_the_same_share_everywhere():
    decays = (0.1, 0.2, 0.4)
    layers, _ = layers_of("energy", decays, [(200, 200)] * 3)
    ranks = spend(layers, 2 * 400 * 30)
    lost = [own[k:].sum() / own.sum() for k, own in zip(ranks, spectra(*decays), strict=True)]
    one_more = [own[k - 1 :].sum() / own.sum() for k, own in zip(ranks, spectra(*decays), strict=True)]
    assert max(lost) <= min(one_more)


def test_costs_of_a_later_step_count():
    """Factors that will be rounded to 4 bits, beside a dense layer that will be too."""
    energies = np.exp(-0.2 * np.arange(24))
    layers = [candidate(energies, 24, 24, "loss", bytes_at=lambda k: 24 * k + 100, dense_bytes=288) for _ in range(2)]
    assert spend(layers, 2 * (24 * 5 + 100)) == [5, 5]
    assert spend(layers, 2 * 288) == [None, None]


# ---- any choices


def best_of(choices, budget):
    return min(
        sum(own[j][1] for own, j in zip(choices, picks, strict=True))
        for picks in itertools.product(*(range(len(own)) for own in choices))
        if sum(own[j][0] for own, j in zip(choices, picks, strict=True)) <= budget
    )


choice_lists = st.lists(
    st.lists(st.tuples(st.integers(1, 50), st.floats(0, 10)), min_size=1, max_size=5), min_size=1, max_size=4
)


@given(choices=choice_lists, extra=st.integers(0, 120))
@settings(max_examples=300, deadline=None)
def test_choices_fit_and_are_near_the_best(choices, extra):
    budget = sum(min(cost for cost, _ in own) for own in choices) + extra
    picks = choose(choices, budget)
    assert sum(own[j][0] for own, j in zip(choices, picks, strict=True)) <= budget
    loss = sum(own[j][1] for own, j in zip(choices, picks, strict=True))
    best = best_of(choices, budget)
    largest_step = max(max(loss for _, loss in own) - min(loss for _, loss in own) for own in choices)
    assert best - 1e-9 <= loss <= best + largest_step + 1e-9
    if extra >= sum(max(cost for cost, _ in own) for own in choices):
        assert loss == pytest.approx(best)


def test_order_of_choices_does_not_matter():
    choices = [[(1, 9.0), (2, 4.0), (4, 1.0), (8, 0.0)], [(1, 7.0), (3, 6.9), (5, 0.5)]]
    expected = [own[j] for own, j in zip(choices, choose(choices, 8), strict=True)]
    turned = [own[::-1] for own in choices]
    assert [own[j] for own, j in zip(turned, choose(turned, 8), strict=True)] == expected


def test_choices_that_nothing_affords_are_refused():
    with pytest.raises(RecipeError, match=r"a budget of 2 bytes cannot be met: the cheapest choices take 3"):
        choose([[(1, 1.0)], [(2, 0.0), (9, 0.0)]], 2)


def test_rank_choices_end_with_the_dense_layer():
    energies = np.array([4.0, 2, 1, 1])
    assert rank_choices(energies, [1, 3], [10, 30], 25) == [(10, 0.5), (30, 0.125), (25, 0.0)]
    assert choose([rank_choices(energies, [1, 3], [10, 30], 25)], 30) == [2]  # rank 3 is never worth it


def test_needs_no_torch():
    code = "import sys, compress.linalg.ranks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
