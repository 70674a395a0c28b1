from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.linalg.order import act_order, group_aware_order, inverse_order

diagonals = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.5, 9.0]), min_size=1, max_size=24).map(torch.tensor)


@given(diagonals, st.sampled_from([-1, 1, 3, 4, 8]))
def test_group_aware_order_is_a_permutation_that_keeps_groups(diagonal, group_size):
    order = group_aware_order(diagonal, group_size)
    n = diagonal.numel()
    assert order.sort().values.tolist() == list(range(n))
    assert order[inverse_order(order)].tolist() == inverse_order(order)[order].tolist() == list(range(n))
    if group_size == -1:
        return
    n_full = n // group_size * group_size
    assert order[n_full:].tolist() == list(range(n_full, n))
    peaks = []
    for group in order[:n_full].split(group_size) if n_full else []:
        assert len(set((group // group_size).tolist())) == 1
        values = diagonal[group].tolist()
        assert values == sorted(values, reverse=True)
        peaks.append(values[0])
    assert peaks == sorted(peaks, reverse=True)


@given(diagonals)
def test_one_group_and_groups_of_one_are_act_order(diagonal):
    expected = act_order(diagonal)
    assert torch.equal(group_aware_order(diagonal, diagonal.numel()), expected)
    assert torch.equal(group_aware_order(diagonal, -1), expected)
    assert torch.equal(group_aware_order(diagonal, 1), expected)


def test_ties_keep_their_order():
    assert act_order(torch.ones(9)).tolist() == list(range(9))
    assert group_aware_order(torch.ones(9), 3).tolist() == list(range(9))
