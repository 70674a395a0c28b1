"""Windows over a text: every token is predicted at most once, and as often as the definition says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import RecipeError
from compress.evaluation.windows import cut_windows


@given(n=st.integers(4, 200), length=st.integers(2, 40), data=st.data())
def test_each_token_is_predicted_once(n: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    if n < length:
        with pytest.raises(RecipeError, match="one window needs"):
            cut_windows(torch.arange(n), length, n, stride)
        return
    windows = cut_windows(torch.arange(n), length, n, stride)
    following, counts = windows.targets()
    predicted = following[counts].tolist()
    assert len(predicted) == len(set(predicted)) == windows.n_scored
    if stride < length:  # overlapping: all but the first token, up to the end of the last window
        assert predicted == list(range(1, length + stride * (len(windows.ids) - 1)))
    else:  # the first token of every window has nothing before it
        assert predicted == [t for t in range(length * len(windows.ids)) if t % length]
    context = (windows.first_scored - 1)[1:]  # tokens seen before the first prediction that counts
    assert (context >= length - stride - 1).all()


def test_a_head_of_the_text_is_enough_for_one_window_at_least() -> None:
    assert len(cut_windows(torch.arange(100), 10, 100, max_tokens=35).ids) == 3
    assert len(cut_windows(torch.arange(100), 10, 100, max_tokens=2).ids) == 1


@pytest.mark.parametrize(("length", "stride"), [(1, None), (8, 0), (8, 9)])
def test_impossible_windows_are_refused(length: int, stride: int | None) -> None:
    with pytest.raises(RecipeError, match="stride"):
        cut_windows(torch.arange(100), length, 100, stride if stride != 0 else -1)
