"""Choosing by bits against `torch.where`, to the last bit."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from frfx.rules import parts
from frfx.rules.where import where, where_equal

BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16}
each_dtype = pytest.mark.parametrize("dtype", BITS, ids=str)
numbers = st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-310, 3e38])
numbers |= st.floats(width=32)


def tensors(data, dtype, count):
    """Draw tensors of one shape, contiguous or not."""
    rows, columns = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 4))
    size = rows * columns
    drawn = [
        torch.tensor(data.draw(st.lists(numbers, min_size=size, max_size=size)), dtype=dtype)
        for _ in range(count)
    ]
    return [
        t.view(columns, rows).T if data.draw(st.booleans()) else t.view(rows, columns)
        for t in drawn
    ]


def assert_same_bits(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    bits = BITS[found.dtype]
    assert torch.equal(found.contiguous().view(bits), expected.contiguous().view(bits))


@each_dtype
@given(data=st.data())
def test_where(dtype, data):
    given, a, b = tensors(data, dtype, 3)
    assert_same_bits(where(given > 0, a, b), torch.where(given > 0, a, b))


@each_dtype
@given(data=st.data(), part=st.sampled_from([3, 1 << 17]))
def test_where_equal(dtype, data, part):
    """All at once, or in parts."""
    given, other, a, b = tensors(data, dtype, 4)
    other = torch.where(a > 0, given, other)
    before = [t.clone() for t in (given, other, a, b)]
    with patch.object(parts, "_CACHED", part):
        found = where_equal(given, other, a, b)
        near = where_equal(given, other, a, b, 1e-3)
    assert_same_bits(found, torch.where(given == other, a, b))
    if dtype != torch.bfloat16:  # whose products are rounded elsewhere
        reach = 1e-3 * (b - a).abs() + torch.finfo(dtype).tiny
        expected = torch.where((given - other).abs() < reach, a, b)
        assert_same_bits(near, expected)
    for now, then in zip((given, other, a, b), before, strict=True):
        assert_same_bits(now, then)


def test_what_is_recorded_has_its_gradient():
    given, other = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 3.0])
    a, b = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    where_equal(given, other, a, b).sum().backward()
    where(given > 2, a, b).sum().backward()
    assert a.grad.tolist() == [1, 0, 2]
    assert b.grad.tolist() == [1, 2, 0]


def test_types_that_differ_are_promoted():
    given = torch.tensor([1.0, 2.0])
    a, b = torch.zeros(2), torch.ones(2, dtype=torch.float64)
    assert where_equal(given, given.double().sqrt(), a, b).tolist() == [0, 1]
