"""A block in two bases: what readers compute, what writers add, what heads mix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from compress.linalg.hadamard import hadamard, random_orthogonal, random_signs, transformed
from compress.linalg.residual import (
    centred,
    folded,
    folded_bias,
    rotated_head_inputs,
    rotated_heads,
    rotated_inputs,
    rotated_outputs,
    rotated_rows,
)
from compress.linalg.rotation import Deferred, DenseRotation, HadamardRotation, MeanKeeping

N, WIDE, HEAD = 24, 40, 4


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotations(n):
    generator = torch.Generator().manual_seed(n)
    yield DenseRotation(random_orthogonal(n, generator))
    yield HadamardRotation(n, n)
    yield HadamardRotation(n, 4, random_signs(n, generator))

    yield Deferred(n, lambda: DenseRotation(random_orthogonal(n, torch.Generator().manual_seed(1))))
    yield MeanKeeping(HadamardRotation(n, n, random_signs(n, generator)))


def rms(x):
    return x / x.square().mean(-1, keepdim=True).sqrt()


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=atol)


@pytest.mark.parametrize("kind", range(5))
def test_rotation_objects(kind):
    rotation = list(rotations(N))[kind]
    matrix = rotation.times(torch.eye(N))
    x = normal(3, 5, N)
    assert rotation.width == N
    close(rotation.times(x), x @ matrix)
    close(rotation.times_transposed(x), x @ matrix.T)
    torch.testing.assert_close(rotation.times_rows(x), x @ matrix, rtol=0, atol=1e-9)
    close(matrix @ matrix.T, torch.eye(N, dtype=torch.float64))
    if kind == 2:
        close(matrix.abs()[matrix != 0], torch.full((N * 4,), 0.5, dtype=torch.float64))
        blocks = torch.block_diag(*[hadamard(4)] * (N // 4))
        close(matrix, rotation.signs[:, None] * blocks)


@pytest.mark.parametrize("kind", range(5))
def test_rows_do_not_depend_on_each_other(kind):
    """To the last bit, as a plain product of matrices is not."""
    rotation = list(rotations(128))[kind]
    table, shift = normal(300, 128), normal(128, seed=1)
    whole, bias = rotated_rows(table, rotation), folded_bias(table, None, shift)
    assert any(not torch.equal(table[i : i + 1] @ shift, (table @ shift)[i : i + 1]) for i in range(300))
    for rows in (slice(0, 1), slice(3, 5), slice(17, 117), slice(299, 300)):
        assert torch.equal(rotated_rows(table[rows], rotation), whole[rows])
        assert torch.equal(folded_bias(table[rows], None, shift), bias[rows])
    assert rotated_rows(table[:0], rotation).shape == (0, 128)


def test_rms_does_not_see_the_basis_and_the_mean_does():
    x = normal(7, N)
    for rotation in rotations(N):
        torch.testing.assert_close(rms(rotation.times(x)), rotation.times(rms(x)), rtol=1e-13, atol=1e-13)
    off = x + 3
    assert (rms(off - off.mean(-1, keepdim=True)) - rms(off)).abs().max() > 0.5


@pytest.mark.parametrize("kind", range(3))
def test_layer_norm_does_not_see_a_basis_that_keeps_the_mean(kind):
    rotation = MeanKeeping(list(rotations(N))[kind])
    matrix = rotation.times(torch.eye(N))
    close(matrix @ matrix.T, torch.eye(N, dtype=torch.float64))
    close(matrix.sum(0), torch.ones(N, dtype=torch.float64))
    x = normal(7, N) + 2
    normed = functional.layer_norm(x, (N,), eps=0.3)
    close(functional.layer_norm(rotation.times(x), (N,), eps=0.3), rotation.times(normed))
    assert torch.equal(MeanKeeping(rotation).times(x), rotation.times(x))  # there is nothing to mend


def test_gain_and_shift_belong_to_the_reader():
    x, weight, gain, shift, bias = (
        normal(7, N),
        normal(WIDE, N, seed=1),
        normal(N, seed=2),
        normal(N, seed=3),
        normal(WIDE),
    )
    for b in (None, bias):
        expected = functional.linear(rms(x) * gain + shift, weight, b)
        close(functional.linear(rms(x), folded(weight, gain), folded_bias(weight, b, shift)), expected, 1e-9)


def test_layer_norm_becomes_rms_where_writers_are_centred():
    hidden, table = normal(7, WIDE), normal(9, N, seed=1)
    weight, bias = normal(N, WIDE, seed=2), normal(N, seed=3)
    ids = torch.tensor([0, 3, 5, 5, 8, 1, 2])
    stream = table[ids] + functional.linear(hidden, weight, bias)
    moved = centred(table, 1)[ids] + functional.linear(hidden, centred(weight, 0), centred(bias, 0))
    close(rms(moved), functional.layer_norm(stream, (N,), eps=0.0))
    close(centred(table[4:6], 1), centred(table, 1)[4:6])  # a function of each row


@pytest.mark.parametrize("kind", range(5))
def test_a_block_in_another_basis(kind):
    """Two linears between a read and a write of the stream, with biases, gain and shift."""
    rotation = list(rotations(N))[kind]
    stream, gain, shift = normal(7, N), normal(N, seed=1), normal(N, seed=2)
    up, up_bias, down, down_bias = (
        normal(WIDE, N, seed=3),
        normal(WIDE, seed=4),
        normal(N, WIDE, seed=5),
        normal(N, seed=6),
    )
    expected = stream + functional.linear(
        functional.linear(rms(stream) * gain + shift, up, up_bias).relu(), down, down_bias
    )
    inner = functional.linear(
        rms(rotation.times(stream)), rotated_inputs(folded(up, gain), rotation), folded_bias(up, up_bias, shift)
    ).relu()
    online = HadamardRotation(WIDE, 20)
    down = rotated_inputs(rotated_outputs(down, rotation), online)  # and what meets the input of `down` while it runs
    added = functional.linear(transformed(inner, 20), down, rotated_outputs(down_bias, rotation))
    close(rotation.times_transposed(rotation.times(stream) + added), expected, 1e-8)


def attention(values, output, bias, n_kv, n_heads, mix, x):
    """y = concat_i(mix_i @ value head of query head i) output^T."""
    v = functional.linear(x, values, bias).unflatten(-1, (n_kv, HEAD))  # [tokens, kv, head]
    v = v.repeat_interleave(n_heads // n_kv, dim=1)
    return torch.einsum("htu,uhd->thd", mix, v).flatten(1) @ output.T


@settings(max_examples=25, deadline=None)
@given(n_kv=st.sampled_from([1, 2, 6]), repeat=st.sampled_from([1, 3]), biased=st.booleans(), seed=st.integers(0, 99))
def test_value_heads(n_kv, repeat, biased, seed):
    n_heads = n_kv * repeat
    values, output = normal(n_kv * HEAD, N, seed=seed), normal(N, n_heads * HEAD, seed=seed + 1)
    bias = normal(n_kv * HEAD, seed=seed + 2) if biased else None
    mix, x = normal(n_heads, 7, 7, seed=seed + 3).softmax(-1), normal(7, N, seed=seed + 4)
    expected = attention(values, output, bias, n_kv, n_heads, mix, x)
    starts = range(0, n_kv * HEAD, HEAD)
    for rotation in rotations(HEAD):
        moved = rotated_heads(values, starts, HEAD, rotation)
        moved_bias = None if bias is None else rotated_heads(bias, starts, HEAD, rotation)
        assert not torch.allclose(moved, values)
        found = attention(moved, rotated_head_inputs(output, HEAD, rotation), moved_bias, n_kv, n_heads, mix, x)
        close(found, expected)


@pytest.mark.parametrize(
    "starts", [(16, 20), (8, 20)]
)  # queries, keys, values in a row; or of one head after the other
def test_values_within_a_fused_linear(starts):
    fused, bias = normal(24, N), normal(24)
    rotation = DenseRotation(random_orthogonal(HEAD, torch.Generator().manual_seed(0)))
    moved, moved_bias = (rotated_heads(t, starts, HEAD, rotation) for t in (fused, bias))
    rows = torch.cat([torch.arange(start, start + HEAD) for start in starts])
    others = [row for row in range(24) if row not in rows]
    assert torch.equal(moved[others], fused[others]) and torch.equal(moved_bias[others], bias[others])
    close(moved[rows], rotated_heads(fused[rows], (0, HEAD), HEAD, rotation))
    close(moved_bias[rows], rotated_heads(bias[rows], (0, HEAD), HEAD, rotation))


def test_permutations_and_signs_move_weights_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    order, signs = torch.randperm(N, generator=generator), random_signs(N, generator)
    rotation = DenseRotation((torch.eye(N, dtype=torch.float64) * signs)[:, order])
    weight = torch.randn(WIDE, N, generator=generator)
    assert torch.equal(rotated_inputs(weight, rotation).float(), (weight * signs.float())[:, order])
    assert torch.equal(rotated_outputs(weight.T, rotation).float(), (weight * signs.float()).T[order])


def test_one_rounding_at_the_end():
    """There and back in float64 restores every bit of a float32 weight."""
    weight = torch.randn(WIDE, N, generator=torch.Generator().manual_seed(0))
    for rotation in rotations(N):
        moved = rotated_inputs(weight, rotation)
        assert moved.dtype == torch.float64
        assert torch.equal(rotation.times_transposed(moved).float(), weight)


def test_cut_to_the_first_directions():
    """With fewer columns than rows: inputs and outputs get smaller, tables narrower."""
    rotation = DenseRotation(random_orthogonal(N, torch.Generator().manual_seed(0))[:, :10])
    x = rotation.times(normal(7, N))
    kept = rotation.times_transposed(x)  # in the span of what is kept nothing is lost
    weight, bias = normal(WIDE, N, seed=1), normal(N, seed=2)
    close(functional.linear(x, rotated_inputs(weight, rotation)), functional.linear(kept, weight))
    assert rotated_outputs(weight.T, rotation).shape == (10, WIDE)
    close(rotated_outputs(bias, rotation), rotation.times(bias))


def test_rotation_takes_away_outliers():
    weight = normal(64, 128)
    weight[:, [3, 77]] *= 40

    def rounding_error(w):  # to 4 bits, one scale per row
        scale = w.abs().amax(1, keepdim=True) / 7
        return float(((w / scale).round() * scale - w).square().sum() / w.square().sum())

    moved = rotated_inputs(weight, HadamardRotation(128, 128, random_signs(128, torch.Generator().manual_seed(0))))
    assert rounding_error(moved) < rounding_error(weight) / 2
